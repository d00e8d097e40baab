"""What the block tensors of one grid have put off, and when it must be put off no longer."""

import weakref
from typing import Any

import torch

_FEW = 64  # references that are kept before the dead ones are sorted out


class Later:
    """What the block tensors of one grid have put off.

    Attributes:
        pending: references to what may not have been computed yet.
        writes: how often a function wrote into pixels of the grid.
        exposed: a caller has been handed a buffer that may change without anybody seeing it.

    A CUDA graph would not repeat what is computed only after its capture, so while one is captured
    nothing is put off, unless somebody settles at the end of it: `with` a `Later` does.
    """

    __slots__ = ("_inside", "_limit", "exposed", "pending", "writes")

    def __init__(self) -> None:
        self.pending: list[weakref.ref] = []
        self._limit = _FEW
        self._inside = 0
        self.writes = 0
        self.exposed = False

    def __enter__(self) -> None:
        self._inside += 1

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._inside -= 1
        if kind is None and not self._inside and torch.cuda.is_current_stream_capturing():
            self.settle()

    def add(self, cell: Any, stream: int) -> None:
        """Note a `Pending` of a stream; it is computed where nothing may be put off."""
        # The default stream, 0, cannot be captured.
        captured = stream and not self._inside and torch.cuda.is_current_stream_capturing()
        if self.exposed or captured:
            cell.compute()
            return
        pending = self.pending
        pending.append(weakref.ref(cell))
        if len(pending) > self._limit:
            self.pending = [r for r in pending if _is_open(r())]
            self._limit = max(_FEW, 2 * len(self.pending))

    def settle(self) -> None:
        """Compute everything that is pending."""
        pending, self.pending = self.pending, []
        try:
            for reference in pending:
                cell = reference()
                if cell is not None:
                    cell.compute()
        except BaseException:
            self.pending += pending
            raise

    def write(self) -> None:
        """Call before a function writes into a buffer of the grid."""
        self.settle()
        self.writes += 1

    def expose(self) -> None:
        """Call before a caller is handed a buffer of the grid."""
        self.write()
        self.exposed = True

    def __reduce__(self) -> tuple:
        return Later, ()


def _is_open(cell: Any) -> bool:
    return cell is not None and cell.job is not None
