"""`gather_windows` and its gradient in plain PyTorch: what the kernels must equal.

As in `reference.py`, each function has the name and signature of the registered operation.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
    channels, taps = padded.shape[1], kernel[0] * kernel[1]
    columns, start = [], 0
    for count, b in ((n_high, block), (n_low, block // 2)):
        height, width = b + more_y, b + more_x
        part = padded[start : start + count * height * width]
        start += count * height * width
        part = part.view(count, height, width, channels).permute(0, 3, 1, 2)
        if count:
            # N,C*K,L
            found = F.unfold(part, tuple(kernel), tuple(dilation), 0, tuple(stride))
            found = found.view(count, channels, taps, -1).permute(0, 3, 2, 1)
            columns.append(found.reshape(-1, taps * channels))
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
    taps = kernel[0] * kernel[1]
    channels = columns.shape[1] // taps
    padded, start = [], 0
    for count, b, s in ((n_high, block, side), (n_low, block // 2, side // 2)):
        part = _accumulate(columns[start : start + count * s * s])
        start += count * s * s
        if count:
            part = part.view(count, s * s, taps, channels).permute(0, 3, 2, 1)  # N,C,K,L
            part = part.reshape(count, channels * taps, s * s)
            size = (b + more_y, b + more_x)
            image = F.fold(part, size, tuple(kernel), tuple(dilation), 0, tuple(stride))
            padded.append(image.permute(0, 2, 3, 1).reshape(-1, channels))
    return torch.cat(padded).to(columns.dtype)
