"""--profiler: where a few steps spend their time."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity

from utils.logger import RunLog

WAIT, WARM_UP, ACTIVE = 2, 1, 3  # steps


class Profile(Protocol):
    """What a loop calls after each of its steps."""

    def step(self) -> None: ...


class _Idle:
    def step(self) -> None:
        pass


@contextmanager
def profiler(args: Namespace, log: RunLog) -> Iterator[Profile]:
    """Profile ACTIVE steps after the first few: a table in run.log, a trace in profile.json."""
    if not args.profiler:
        yield _Idle()
        return

    def report(profile: torch.profiler.profile) -> None:
        log.info(profile.key_averages().table(sort_by=order, row_limit=30))
        profile.export_chrome_trace(str(log.folder / "profile.json"))
        log.info(f"trace of {ACTIVE} steps: {log.folder / 'profile.json'} (chrome://tracing)")

    activities = [ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    schedule = torch.profiler.schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=report
    ) as profile:
        yield profile
        if profile.step_num <= WAIT + WARM_UP:
            log.warning(
                f"warning: no profile: that begins after {WAIT + WARM_UP} steps, and there were "
                f"{profile.step_num}"
            )
