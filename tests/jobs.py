"""train.py in processes of their own, which may be killed, on the tiny network."""

import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny import BACKBONES, TINY
from together import CONTEXT, run_all
from torch import nn

import train
from utils import checkpoint
from utils.training import state
from utils.training.trainer import Trainer

CONTEXT.set_forkserver_preload(["jobs"])


@dataclass(frozen=True)
class Kill:
    """A signal to `rank`: in a step of the run, or in the middle of writing a file.

    `group`: also to all processes that it has started.
    """

    step: int  # counted from 0; or the number of files written before
    rank: int = 0
    while_saving: bool = False
    signal: str = "KILL"
    group: bool = False

    @property
    def signal_number(self) -> int:
        return int(signal.Signals[f"SIG{self.signal}"])


def run_job(
    argv: list[str],
    count: int = 1,
    kill: Kill | None = None,
    sgd: bool = False,
    nodes: bool = False,
    peers: bool = False,
) -> list[int]:
    """Run train.py in `count` processes; -> their exit statuses, negative for a signal.

    `sgd` puts plain gradient descent in the place of Adam, which makes much of rounding, and keeps
    CUDA to whole float32. With `nodes` each process passes for a node of its own with one CUDA
    device, which is the same one; with `peers` they reach each other's memory there all the same.
    Without `nodes` they do where GPUs can.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_process, args=(argv, rank, count, port, kill, sgd, nodes, peers))
        for rank in range(count)
    ]
    return run_all(processes)


def _process(
    argv: list[str],
    rank: int,
    count: int,
    port: int,
    kill: Kill | None,
    sgd: bool,
    nodes: bool,
    peers: bool,
) -> None:
    torch.set_num_threads(1)
    BACKBONES["tiny"] = TINY
    warnings.filterwarnings("error", message=".*trains without CUDA graphs")
    if count > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if nodes:  # NCCL takes one process a device of a host, and talks to others through sockets
            os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
            os.environ.update(NCCL_HOSTID=f"node{rank}", NCCL_SOCKET_IFNAME="lo")
            os.environ["SEGBLOCKS_PEERS"] = str(int(peers))
    if sgd:
        state.build_optimizer = _gradient_descent
        torch.backends.cudnn.allow_tf32 = False
    if kill and kill.rank == rank:
        if kill.group:
            os.setpgid(0, 0)
        _kill_at(kill)
    sys.exit(train.main(argv))


def _gradient_descent(model: nn.Module, args) -> torch.optim.SGD:
    groups = [{"name": "all", "params": list(model.parameters())}]
    return torch.optim.SGD(groups, args.lr, momentum=0.5)


def _kill_at(kill: Kill) -> None:
    step = Trainer._step

    def step_or_die(self, means):
        if self.progress.total_steps == kill.step:
            _send(kill)
        step(self, means)

    if not kill.while_saving:
        Trainer._step = step_or_die
        return
    saved: list[Path] = []
    checkpoint.torch.save = _half_written(checkpoint.torch.save, saved, kill.step)


def _send(kill: Kill) -> None:
    if not kill.group:
        os.kill(os.getpid(), kill.signal_number)
        return
    # By a stranger: data workers forgive their parent.
    command = ["kill", f"-{kill.signal_number}", "--", f"-{os.getpid()}"]
    subprocess.run(command, check=True, start_new_session=True)


def _half_written(save: Callable, saved: list, count: int) -> Callable:
    def save_half(state, file) -> None:
        save(state, file)
        saved.append(file.name)
        if len(saved) > count:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return save_half
