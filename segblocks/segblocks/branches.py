"""What needs nothing of one another, side by side in a CUDA graph."""

import itertools
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

# By device, stream that they branch off, and number. They stay, because memory of a graph's pool
# belongs to the stream that it was taken on.
_branches: dict[tuple[int, int, int], torch.cuda.Stream] = {}
_taken: set[torch.cuda.Stream] = set()


def side_by_side(device: torch.device, *calls: Callable[[], T]) -> list[T]:
    """What each of the calls returns.

    In the capture of a CUDA graph each but the first goes on a branch of its own, so that small
    launches share the device. Elsewhere they go one after the other: on blocks it is the host that
    eager execution waits for, and streams are more to do for it.

    A branch starts after all that was launched before and has ended before whatever is launched
    next, so memory that is freed on either side may be taken again as ever.
    """
    if len(calls) < 2 or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return [call() for call in calls]
    here = torch.cuda.current_stream(device)
    branches = [_take_branch(here) for _ in calls[1:]]
    try:
        for branch in branches:
            branch.wait_stream(here)
        results = [calls[0]()]
        for branch, call in zip(branches, calls[1:]):
            with torch.cuda.stream(branch):
                results.append(call())
        for branch in branches:
            here.wait_stream(branch)
    finally:
        _taken.difference_update(branches)
    return results


def _take_branch(of: torch.cuda.Stream) -> torch.cuda.Stream:
    """One that no call further up is on; PyTorch gives out the same few streams again and again."""
    for number in itertools.count():
        key = (of.device_index, of.cuda_stream, number)
        if key not in _branches:
            _branches[key] = torch.cuda.Stream(of.device)
        if _branches[key] not in (of, *_taken):
            _taken.add(_branches[key])
            return _branches[key]
    raise AssertionError("numbers do not end")
