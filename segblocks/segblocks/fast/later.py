"""What the block tensors of one grid have put off, and when it must be put off no longer."""

import weakref
from typing import Any

_FEW = 64  # references that are kept before the dead ones are sorted out


class Later:
    """What the block tensors of one grid have put off.

    Attributes:
        pending: references to what may not have been computed yet.
        writes: how often a function wrote into pixels of the grid.
        exposed: a caller has been handed a buffer that may change without anybody seeing it.
    """

    __slots__ = ("_limit", "exposed", "pending", "writes")

    def __init__(self) -> None:
        self.pending: list[weakref.ref] = []
        self._limit = _FEW
        self.writes = 0
        self.exposed = False

    def add(self, cell: Any) -> None:
        """Note a `Pending`; where a buffer is exposed, it is not."""
        if self.exposed:
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
