"""Checkpoints written while training goes on."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segblocks.structure import map_structure
from utils.checkpoint import save_checkpoint
from utils.errors import UserError, one_line
from utils.logger import RunLog
from utils.ranks import Ranks

# Of all writers of a process: files on their way to one name have one name, too.
_one_at_a_time = threading.Lock()


class Saver:
    """Checkpoints of a run on one rank or several: the main one writes, all know of failures."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.writer = ranks, CheckpointWriter()

    def save(
        self,
        path: Path,
        state: dict[str, Any],
        log: RunLog,
        keep_previous: bool = False,
        also: Path | None = None,
    ) -> None:
        """Begin to write a checkpoint, where the one before could be written or this one can.
        Raises UserError otherwise, with older ones untouched."""

        def write() -> None:
            failure = self.writer.write(path, state, keep_previous, also)
            if failure is not None:
                log.warning(f"warning: {one_line(failure)}; the checkpoint after that was written")

        self._on_main_rank(write)

    def wait(self) -> None:
        """Until all is written. Raises UserError where that was impossible."""
        self._on_main_rank(self.writer.wait)

    def settle(self, log: RunLog) -> None:
        """The same after another error, without other ranks: failures are logged alone."""
        try:
            self.writer.wait()
        except Exception as error:
            log.warning(f"warning: the last checkpoint could not be written: {one_line(error)}")

    def _on_main_rank(self, write: Callable[[], object]) -> None:
        failure = None
        if self.ranks.main:
            try:
                write()
            except OSError as error:
                failure = f"{one_line(error)}; the checkpoints before it are as they were"
        failures = [text for text in self.ranks.everyones(failure) if text]
        if failures:
            raise UserError(failures[0])


class CheckpointWriter:
    """Writes checkpoints in another thread, one after the other, as `save_checkpoint` does.

    A write takes as long as an epoch of a small data set. What is written is the state at the call
    of `write`: tensors are copied, those on a GPU to pinned memory, which is kept for the next
    time, without waiting for the device.
    """

    def __init__(self) -> None:
        self._under_way: _Write | None = None
        self._pinned: list[tuple[Any, Tensor]] = []  # layouts, and memory for tensors like that

    @property
    def has_failed(self) -> bool:
        """Whether the last write has ended, and not well."""
        under_way = self._under_way
        return under_way is not None and not under_way.is_alive() and under_way.error is not None

    def write(
        self,
        path: Path,
        state: dict[str, Any],
        keep_previous: bool = False,
        also: Path | None = None,
    ) -> OSError | None:
        """Begin to write `state` to `path`, and to `also`, when the write before has ended.

        If that one failed for its file or its disk, this one is waited for and raises what it
        raises; returns the failure before it if it went well, else None.
        """
        failure = None
        try:
            self.wait()
        except OSError as error:
            failure = error
        state, copied = self._snapshot(state)
        self._under_way = _Write(copied, path, state, keep_previous, also)
        self._under_way.start()
        if failure is not None:
            self.wait()
        return failure

    def wait(self) -> None:
        """Until everything is written; raises what `save_checkpoint` raised, once."""
        under_way = self._under_way
        if under_way is None:
            return
        under_way.join()  # a signal may end that, and nothing is forgotten
        self._under_way = None
        if under_way.error is not None:
            raise under_way.error

    def _snapshot(self, state: dict[str, Any]) -> tuple[dict[str, Any], list[torch.cuda.Event]]:
        """The state in CPU memory of its own, and what tells when copies have arrived there."""
        pinned, self._pinned, devices = iter(self._pinned), [], set()

        def copy(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            if not tensor.is_cuda:
                return tensor.clone()
            devices.add(tensor.device)
            layout = (tensor.shape, tensor.stride(), tensor.dtype)
            of, kept = next(pinned, (None, None))
            if of != layout:
                kept = _empty_on_host(tensor)
            self._pinned.append((layout, kept))
            return kept.copy_(tensor, non_blocking=True)

        state = map_structure(state, Tensor, copy)
        events = []
        for device in devices:
            events.append(torch.cuda.Event(blocking=True))
            events[-1].record(torch.cuda.current_stream(device))
        return state, events


def _empty_on_host(tensor: Tensor) -> Tensor:
    """Of the same strides: an optimiser's moments have to lie in memory as the weights do."""
    with suppress(RuntimeError):  # a system may allow little pinned memory
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")


class _Write(threading.Thread):
    """One write. Python waits for it when it ends: a thread that it leaves behind in PyTorch would
    be torn down there, and abort the process."""

    def __init__(self, copied: list[torch.cuda.Event], *given: Any):
        """`given` is what `save_checkpoint` takes."""
        super().__init__(name="checkpoint")
        self._copied, self._given = copied, given
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for event in self._copied:
                event.synchronize()
            with _one_at_a_time:
                save_checkpoint(*self._given)
        except BaseException as error:
            self.error = error
        finally:
            del self._given
