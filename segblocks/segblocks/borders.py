"""Images of any size: padded to whole blocks, and what networks return of them cropped again."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .structure import map_structure

_SIMPLE = 16  # denominators of factors by which a network may resize its output


def pad_to_blocks(image: Tensor, block_size: int) -> Tensor:
    """Zeros at the right and at the bottom up to a multiple of the block size."""
    right, bottom = -image.shape[3] % block_size, -image.shape[2] % block_size
    return F.pad(image, (0, right, 0, bottom)) if right or bottom else image


def crop_output(output: Any, padded: tuple[int, int], size: tuple[int, int]) -> Any:
    """Cut from network outputs of any stride what belongs to the padding of the image.

    Pictures are (…, h, w), or else (N, h, w, C); whatever is neither is left as it is.
    """
    if padded == size:
        return output

    def crop(x: Tensor) -> Tensor:
        for first in (x.dim() - 2, 1) if x.dim() == 4 else (x.dim() - 2,):
            sides = tuple(x.shape[first : first + 2])
            if x.dim() >= 3 and _is_scaled(*sides, *padded):
                height, width = (-(-s * n // p) for s, n, p in zip(size, sides, padded))
                return x.narrow(first, 0, height).narrow(first + 1, 0, width)
        return x

    return map_structure(output, Tensor, crop)


def _is_scaled(h: int, w: int, height: int, width: int) -> bool:
    """Whether (h, w) is (height, width) divided by a whole number, or times a simple fraction."""
    if h == 0 or h * width != w * height:
        return False
    return height % h == 0 or any(h * below % height == 0 for below in range(1, _SIMPLE + 1))
