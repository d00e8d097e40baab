"""A convolution of small blocks as one matrix product of gathered windows, for both resolutions.

A block of four pixels with a halo of one is more halo than block, and both of cuDNN's convolutions
would work on it all; a matrix has a row for each output and no more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..branches import side_by_side
from ..ops.cudnn import takes_cudnn
from ..ops.windows import gather_windows, sum_windows
from .normalise import as_image, as_pixels
from .setting import Setting

# Side of a high block up to which a convolution is a product of gathered windows: there two
# convolutions of padded blocks take two to three times as long, and their gradients four.
_SMALL = 4


def multiplies(x: Tensor, setting: Setting) -> bool:
    """Whether a convolution with `x` is a matrix product."""
    return setting.out_block <= _SMALL and takes_cudnn(x, setting.groups)


def multiply(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    setting: Setting,
    norm: tuple[Tensor, bool] | None,
) -> Tensor:
    """(P', COUT) outputs; arguments as of `recompute`'s convolution."""
    columns = gather_windows(setting.padded(pixels, norm), setting.windows(weight.shape[2:]))
    return as_pixels(F.conv2d(as_image(columns), _as_matrix(weight), bias))


def multiply_backward(
    pixels: Tensor,
    weight: Tensor,
    grad: Tensor,
    setting: Setting,
    wanted: tuple[bool, bool],
    norm: tuple[Tensor, bool] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of pixels and weight, as far as wanted."""
    windows = setting.windows(weight.shape[2:])
    columns = gather_windows(setting.padded(pixels, norm), windows)
    window = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    given = (as_image(grad), as_image(columns), _as_matrix(weight), None, *window)

    def differentiate(*mask: bool) -> Tensor:
        return torch.ops.aten.convolution_backward(*given, (*mask, False))[mask.index(True)]

    def of_pixels() -> Tensor:
        return setting.gradient(sum_windows(as_pixels(differentiate(True, False)), windows))

    def of_weight() -> Tensor:
        outputs, inputs, height, width = weight.shape
        matrix = differentiate(False, True)
        return matrix.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2)

    calls = [call for call, asked in zip((of_pixels, of_weight), wanted) if asked]
    found = iter(side_by_side(grad.device, *calls))
    return next(found) if wanted[0] else None, next(found) if wanted[1] else None


def _as_matrix(weight: Tensor) -> Tensor:
    """(O, I, KH, KW) → (O, KH * KW * I, 1, 1): of a 1×1 convolution, so that TF32 is where it is in
    the network's others; a view if it is channels_last."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1, 1, 1)
