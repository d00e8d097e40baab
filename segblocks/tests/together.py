"""Runs a function in several processes that `torch.distributed` joins over gloo."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# One process that has imported everything and forks for every job: a fork of the process that runs
# the tests could not differentiate, and a fresh one takes seconds to import torch.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
CONTEXT.set_forkserver_preload(["together"])


def run_all(processes: list, seconds: float = 120) -> list[int]:
    """Start processes of CONTEXT and wait; -> their exit statuses. What hangs is killed."""
    with pytest.MonkeyPatch.context() as patch:
        # The process that forks imports on its own, and does not hear of this one's sys.path.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        for process in processes:
            process.start()
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run_together(function: Callable, count: int, folder: Path, *args: Any) -> list[Any]:
    """`function(*args)` in `count` processes; -> what each returned. Fails if one of them does."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        CONTEXT.Process(target=_member, args=(function, rank, count, folder, args))
        for rank in range(count)
    ]
    assert run_all(processes) == [0] * count
    return [torch.load(folder / f"result{rank}.pth") for rank in range(count)]


def _member(function: Callable, rank: int, count: int, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=count
    )
    torch.save(function(*args), folder / f"result{rank}.pth")
    dist.destroy_process_group()
