"""`gather_windows` and its gradient in plain PyTorch: what the kernels must equal.

As in `reference.py`, each function has the name and signature of the registered operation.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .reference import _accumulate


def gather_windows(
    padded: Tensor,
    n_high: int,
    n_low: int,
    block: int,
    more_y: int,
    more_x: int,
    side: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    channels = padded.shape[1]
    columns, start = [], 0
    for count, b, s in ((n_high, block, side), (n_low, block // 2, side // 2)):
        height, width = b + more_y, b + more_x
        part = padded[start : start + count * height * width]
        start += count * height * width
        if count:
            part = part.view(count, height, width, channels)
            taps = [part[:, y, x] for y, x in _taps(s, kernel, stride, dilation)]
            columns.append(torch.stack(taps, 3).view(-1, len(taps) * channels))
    return torch.cat(columns)


def sum_windows(
    columns: Tensor,
    n_high: int,
    n_low: int,
    block: int,
    more_y: int,
    more_x: int,
    side: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    channels = columns.shape[1] // (kernel[0] * kernel[1])
    padded, start = [], 0
    for count, b, s in ((n_high, block, side), (n_low, block // 2, side // 2)):
        part = _accumulate(columns[start : start + count * s * s])
        start += count * s * s
        if count:
            part = part.view(count, s, s, -1, channels)
            image = part.new_zeros((count, b + more_y, b + more_x, channels))
            for tap, (y, x) in enumerate(_taps(s, kernel, stride, dilation)):
                image[:, y, x] += part[:, :, :, tap]
            padded.append(image.view(-1, channels))
    return torch.cat(padded).to(columns.dtype)


def _taps(
    side: int, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of a padded block that each tap reads, for outputs of that side."""
    down, across = (
        [slice(start, start + (side - 1) * step + 1, step) for start in range(0, k * d, d)]
        for k, step, d in zip(kernel, stride, dilation)
    )
    return ((y, x) for y in down for x in across)
