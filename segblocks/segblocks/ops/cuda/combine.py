"""Launchers of `combine.cu`."""

import torch
from torch import Tensor

from . import geometry as geo
from .image import kernel_for

_THREADS = 256


def combine(
    pixels: Tensor,
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    legacy: bool,
    channels_last: bool = True,
) -> Tensor:
    """Pixel buffer (P, C) → image (N, C, Gh*block, Gw*block) in one launch.

    Raises:
        TypeError, ValueError: see `geometry.check` and `check_pixels`.
    """
    geo.check(pixels, slot, cells, n_high, block)
    geo.check_pixels(pixels, geo.stored_pixels(slot, n_high, block))
    image = geo.new_image(pixels, slot, block, channels_last)
    if image.numel():
        kernel = kernel_for(
            "combine.cu", "combine", image, pixels, slot, n_high, block, legacy, _THREADS
        )
        kernel.launch(
            pixels.device, pixels.data_ptr(), image.data_ptr(), slot.data_ptr(), cells.data_ptr()
        )
    return image


def combine_backward(
    grad: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, legacy: bool
) -> Tensor:
    """Gradient of the image, of any strides → gradient of the pixel buffer (P, C), by gathering.

    Raises:
        TypeError, ValueError: see `geometry.check` and `check_image`.
    """
    geo.check(grad, slot, cells, n_high, block)
    geo.check_image(grad, slot, block)
    rows = geo.stored_pixels(slot, n_high, block)
    pixels = torch.empty((rows, grad.shape[1]), dtype=grad.dtype, device=grad.device)
    if pixels.numel():
        kernel = kernel_for(
            "combine.cu", "combine_backward", grad, pixels, slot, n_high, block, legacy, _THREADS
        )
        kernel.launch(
            grad.device, grad.data_ptr(), pixels.data_ptr(), slot.data_ptr(), cells.data_ptr()
        )
    return pixels
