"""Checkpoints written while training goes on."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segblocks.structure import map_structure
from utils.checkpoint import save_checkpoint
from utils.errors import UserError, one_line
from utils.logger import RunLog
from utils.ranks import Ranks

Pinned = list[tuple[Any, Tensor]]  # layouts, and memory for tensors like that

# Of all writers of a process: files on their way to one name have one name, too.
_one_at_a_time = threading.Lock()


class Saver:
    """Checkpoints of a run on one rank or several: the main one writes, all know of failures."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.writer = ranks, CheckpointWriter()

    def take(self, state: dict[str, Any]) -> "Snapshot | None":
        """The state as it is now, for `save` later; on the main rank."""
        return self.writer.snapshot(state) if self.ranks.main else None

    def save(
        self,
        path: Path,
        state: "Snapshot | None",
        log: RunLog,
        keep_previous: bool = False,
        also: Path | None = None,
    ) -> None:
        """Begin to write a checkpoint, where the one before could be written or this one can.
        `state` is from `take`. Raises UserError otherwise, with older ones untouched."""

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
    of `write`, or of `snapshot` before it. Behind the write that is under way others may wait, such
    as one of the latest state and one that is to be kept as the best. A newer state takes the place
    of those that it replaces.
    """

    MOST_WAITING = 2  # each holds a copy of the state; `write` waits for what would be more

    def __init__(self) -> None:
        self._writes: list[_Write] = []  # that have not ended, in order
        self._pinned: list[Pinned] = []  # that no snapshot uses

    @property
    def has_failed(self) -> bool:
        """Whether the last write has ended, and not well."""
        return bool(self._writes) and self._writes[-1].has_failed

    def snapshot(self, state: dict[str, Any]) -> "Snapshot":
        """The state as it is now: tensors are copied, those on a GPU to pinned memory, which is
        kept for later, without waiting for the device."""
        return _snapshot(state, self._pinned.pop() if self._pinned else [])

    def write(
        self,
        path: Path,
        state: "dict[str, Any] | Snapshot",
        keep_previous: bool = False,
        also: Path | None = None,
    ) -> OSError | None:
        """Begin to write `state` to `path`, and to `also`, or to do that after the write that is
        under way.

        If one before has failed for its file or its disk, this one is waited for and raises what it
        raises; returns the failure before it if it went well, else None.
        """
        failure = None
        try:
            self._forget_ended()
            for waiting in self._writes[1:]:
                if waiting.path == path and waiting.withdraw(also):
                    self._forget(waiting)
                    keep_previous = keep_previous and waiting.keep_previous
            while len(self._writes) > self.MOST_WAITING:
                self._writes[0].join()
                self._forget_ended()
        except OSError as error:
            failure = error
            self.wait()  # for what came after that
        snapshot = state if isinstance(state, Snapshot) else self.snapshot(state)
        before = self._writes[-1] if self._writes else None
        self._writes.append(_Write(before, snapshot, path, keep_previous, also))
        self._writes[-1].start()
        if failure is not None:
            self.wait()
        return failure

    def wait(self) -> None:
        """Until everything is written; raises what `save_checkpoint` raised, once, if a write has
        failed and no later one has written all of its files."""
        failures: list[tuple[set[Path], BaseException]] = []
        while self._writes:
            write = self._writes[0]
            write.join()  # a signal may end that, and nothing is forgotten
            if write.error is not None:
                failures.append((write.files, write.error))
            else:
                failures = [(files - write.files, error) for files, error in failures]
            self._forget(write)
        for files, error in failures:
            if files:
                raise error

    def _forget_ended(self) -> None:
        """Raises what the first of them raised."""
        for write in [write for write in self._writes if not write.is_alive()]:
            self._forget(write)
            if write.error is not None:
                raise write.error

    def _forget(self, write: "_Write") -> None:
        self._writes.remove(write)
        self._pinned.append(write.pinned)


@dataclass(frozen=True)
class Snapshot:
    """A state in CPU memory of its own.

    Attributes:
        copied: tell when tensors of a GPU have arrived.
        pinned: memory that they are in.
    """

    state: dict[str, Any]
    copied: list[torch.cuda.Event]
    pinned: Pinned


def _snapshot(state: dict[str, Any], pinned: Pinned) -> Snapshot:
    """`pinned` is memory to use where it fits."""
    known, devices = iter(pinned.copy()), set()
    pinned.clear()

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor.clone()
        devices.add(tensor.device)
        layout = (tensor.shape, tensor.stride(), tensor.dtype)
        of, kept = next(known, (None, None))
        if of != layout:
            kept = _empty_on_host(tensor)
        pinned.append((layout, kept))
        return kept.copy_(tensor, non_blocking=True)

    state = map_structure(state, Tensor, copy)
    events = []
    for device in devices:
        events.append(torch.cuda.Event(blocking=True))
        events[-1].record(torch.cuda.current_stream(device))
    return Snapshot(state, events, pinned)


def _empty_on_host(tensor: Tensor) -> Tensor:
    """Of the same strides: an optimiser's moments have to lie in memory as the weights do."""
    with suppress(RuntimeError):  # a system may allow little pinned memory
        return torch.empty_like(tensor, device="cpu", pin_memory=True)
    return torch.empty_like(tensor, device="cpu")


class _Write(threading.Thread):
    """One write, after another one. Python waits for it when it ends: a thread that it leaves
    behind in PyTorch would be torn down there, and abort the process."""

    def __init__(
        self,
        before: "_Write | None",
        snapshot: Snapshot,
        path: Path,
        keep_previous: bool,
        also: Path | None,
    ):
        super().__init__(name="checkpoint")
        self.path, self.pinned, self.keep_previous = path, snapshot.pinned, keep_previous
        self._before, self._copied, self._also = before, snapshot.copied, also
        self._given = (path, snapshot.state, keep_previous, also)
        self.files = {path} if also is None else {path, also}
        self._may_begin = threading.Lock()  # taken by whoever decides whether it does
        self.error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        return not self.is_alive() and self.error is not None

    def withdraw(self, also: Path | None) -> bool:
        """Whether nothing will be written, as it has not begun, nor is it for another file than its
        own and the `also` of what takes its place."""
        return self._also in (None, also) and self._may_begin.acquire(blocking=False)

    def run(self) -> None:
        try:
            if self._before is not None:
                self._before.join()
            if not self._may_begin.acquire(blocking=False):
                return
            for event in self._copied:
                event.synchronize()
            with _one_at_a_time:
                save_checkpoint(*self._given)
        except BaseException as error:
            self.error = error
        finally:
            self._given, self._before = (), None
