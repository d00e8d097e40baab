"""Checkpoints written while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segblocks.structure import map_structure
from utils.checkpoint import save_checkpoint


class CheckpointWriter:
    """Writes checkpoints in another thread, one after the other, as `save_checkpoint` does.

    A write takes as long as an epoch of a small data set. What is written is the state at the call
    of `write`: tensors are copied, those on a GPU to pinned memory, which is kept for the next
    time, without waiting for the device.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._under_way: Future[None] | None = None
        self._pinned: list[Tensor] = []

    def write(self, path: Path, state: dict[str, Any], keep_previous: bool = False) -> None:
        """Begin to write `state` to `path`, when the write before has ended; raises what that one
        raised (see `wait`)."""
        self.wait()
        state, copied = self._snapshot(state)
        self._under_way = self._thread.submit(_write, copied, path, state, keep_previous)

    def wait(self) -> None:
        """Until everything is written; raises what `save_checkpoint` raised, once."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _snapshot(self, state: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
        """The state in CPU memory of its own, and what tells when copies have arrived there."""
        pinned, device = iter(self._pinned), None
        self._pinned = []

        def copy(tensor: Tensor) -> Tensor:
            nonlocal device
            tensor = tensor.detach()
            if not tensor.is_cuda:
                return tensor.clone()
            device = tensor.device
            kept = next(pinned, None)
            if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
                kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._pinned.append(kept)
            return kept.copy_(tensor, non_blocking=True)

        state = map_structure(state, Tensor, copy)
        if device is None:
            return state, None
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))
        return state, copied


def _write(
    copied: torch.cuda.Event | None, path: Path, state: dict[str, Any], keep_previous: bool
) -> None:
    if copied is not None:
        copied.synchronize()
    save_checkpoint(path, state, keep_previous)
