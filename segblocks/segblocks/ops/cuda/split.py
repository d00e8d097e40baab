"""Launchers of `split.cu`."""

import torch
from torch import Tensor

from . import geometry as geo
from .image import kernel_for


def split(image: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int) -> Tensor:
    """Image (N, C, Gh*block, Gw*block) of any strides → pixel buffer (P, C).

    Raises:
        TypeError, ValueError: see `geometry.check` and `check_image`.
    """
    geo.check(image, slot, cells, n_high, block)
    geo.check_image(image, slot, block)
    rows = geo.stored_pixels(slot, n_high, block)
    pixels = torch.empty((rows, image.shape[1]), dtype=image.dtype, device=image.device)
    if pixels.numel():
        kernel = kernel_for("split.cu", "split", image, pixels, slot, n_high, block)
        kernel.launch(
            image.device, image.data_ptr(), pixels.data_ptr(), slot.data_ptr(), cells.data_ptr()
        )
    return pixels


def split_backward(
    grad: Tensor, slot: Tensor, cells: Tensor, n_high: int, block: int, channels_last: bool
) -> Tensor:
    """Gradient of the pixel buffer (P, C) → gradient of the image, in the layout asked for.

    Raises:
        TypeError, ValueError: see `geometry.check` and `check_pixels`.
    """
    geo.check(grad, slot, cells, n_high, block)
    geo.check_pixels(grad, geo.stored_pixels(slot, n_high, block))
    image = geo.new_image(grad, slot, block, channels_last)
    if image.numel():
        kernel = kernel_for("split.cu", "split_backward", image, grad, slot, n_high, block)
        kernel.launch(
            grad.device, grad.data_ptr(), image.data_ptr(), slot.data_ptr(), cells.data_ptr()
        )
    return image
