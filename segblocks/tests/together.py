"""Runs a function in several processes that `torch.distributed` joins over gloo."""

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# One process that has imported everything and forks for every job: a fork of the process that runs
# the tests could not differentiate, and a fresh one takes seconds to import torch.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")


def run_together(function: Callable, count: int, folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` in `count` processes; -> what each returned. Fails if one of them does."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        CONTEXT.Process(target=_member, args=(function, rank, count, folder, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(folder / f"result{rank}.pth") for rank in range(count)]


def _member(function: Callable, rank: int, count: int, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=count
    )
    torch.save(function(*args), folder / f"result{rank}.pth")
    dist.destroy_process_group()
