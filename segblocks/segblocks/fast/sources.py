"""The pixels that a launch reads which has been put off."""

from typing import NamedTuple

from torch import Tensor

from .pending import Pending

_new = tuple.__new__  # in place of a NamedTuple's own, which is a Python function
ALIGNED = 15  # bits of an address that must be zero: kernels read 16 bytes at once


class Source(NamedTuple):
    """Pixels that a launch reads.

    Attributes:
        address, averages: where they and what follows them lie; averages 0 where nobody reads any.
        holders: what keeps them there, first the pixels.
        watched: a buffer that somebody else may have kept; version: its version by now.
    """

    address: int
    averages: int
    holders: tuple
    watched: Tensor | None = None
    version: int = 0

    def check(self) -> None:
        """Raise RuntimeError if the pixels were changed where nobody saw it."""
        if self.watched is not None and self.watched._version != self.version:
            raise RuntimeError(
                "pixels of blocks were changed in place before an operation that had read them was "
                "computed; take them from the block tensor (x.pixels) instead of keeping them"
            )


def hold(value: Tensor | Pending) -> Source:
    """Pixels alone, computed by now."""
    if type(value) is Pending:
        value.locate(False)
        return _new(Source, (value.address, 0, (value.buffer,), None, 0))
    if value.is_inference():
        return Source(value.data_ptr(), 0, (value,))
    return Source(value.data_ptr(), 0, (value,), value, value._version)
