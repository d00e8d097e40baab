"""`gather_windows`: what every window of a convolution reads, as rows of a matrix.

A convolution of small blocks is then one matrix product for both resolutions.
"""

from typing import NamedTuple

from torch import Tensor

from . import windows_reference
from .library import define, stored_pixels

_BLOCKS = "int n_high, int n_low, int block, int more_y, int more_x, int side"
_WINDOW = "int[2] kernel, int[2] stride, int[2] dilation"


class Windows(NamedTuple):
    """Windows over blocks that are padded as by `blockpad`.

    Attributes:
        n_high, n_low: number of blocks.
        block: side of a high block in pixels; more_y, more_x: rows and columns of its halo.
        side: outputs a high block's side; half as many for a low one.
        kernel, stride, dilation: of rows and columns.
    """

    n_high: int
    n_low: int
    block: int
    more_y: int
    more_x: int
    side: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def padded_rows(self) -> int:
        """Pixels of all padded blocks."""
        return stored_pixels(self.n_high, self.n_low, self.block, self.more_y, self.more_x)

    @property
    def rows(self) -> int:
        """Outputs of all blocks."""
        return stored_pixels(self.n_high, self.n_low, self.side)

    def check(self, x: Tensor, rows: int, taps: int = 1) -> int:
        """-> C of `x` (rows, taps * C).

        Raises:
            ValueError: a shape that does not fit, or windows that do not.
        """
        more = (self.more_y, self.more_x)
        for block, side in ((self.block, self.side), (self.block // 2, self.side // 2)):
            for extra, k, s, d in zip(more, self.kernel, self.stride, self.dilation):
                if (block + extra - d * (k - 1) - 1) // s + 1 != side:
                    raise ValueError(
                        f"windows of {self.kernel}, stride {self.stride}, dilation {self.dilation} "
                        f"over blocks of {block} pixels with {more} more do not give {side} a side"
                    )
        if x.dim() != 2 or x.shape[0] != rows or x.shape[1] % taps:
            raise ValueError(f"expected ({rows}, {taps} * C), got {tuple(x.shape)}")
        if not x.is_contiguous():
            raise ValueError(f"must be contiguous; got strides {x.stride()}")
        return x.shape[1] // taps


def _fake_gather(padded, *windows):
    w = Windows(*windows)
    return padded.new_empty((w.rows, w.taps * padded.shape[1]))


def _fake_sum(columns, *windows):
    w = Windows(*windows)
    return columns.new_empty((w.padded_rows, columns.shape[1] // w.taps))


_gather_windows = define(
    "gather_windows",
    f"(Tensor padded, {_BLOCKS}, {_WINDOW}) -> Tensor",
    _fake_gather,
    windows_reference,
)
_sum_windows = define(
    "sum_windows",
    f"(Tensor columns, {_BLOCKS}, {_WINDOW}) -> Tensor",
    _fake_sum,
    windows_reference,
)


def gather_windows(padded: Tensor, windows: Windows) -> Tensor:
    """Padded blocks (P', C), contiguous → (P, KH * KW * C): a row for each output in storage order,
    its taps row by row, channels innermost, as in a channels_last weight; no autograd."""
    return _gather_windows(padded, *windows)


def sum_windows(columns: Tensor, windows: Windows) -> Tensor:
    """The gradient of `gather_windows`: (P, KH * KW * C), contiguous → (P', C), for each padded
    pixel the sum of all that was read of it; the same bits every time; no autograd."""
    return _sum_windows(columns, *windows)
