"""Parameters of fused steps, laid out as the kernels read them."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import patches
from .row_conv import pack_weights
from .row_tiles import STEP
from .stem import stem_applies, stem_matrix
from .steps import Affine, ConvStep, StemStep


@dataclass(frozen=True)
class Packed:
    """Parameters of a step.

    Attributes:
        channels: input, second input, output; the second input of a patch convolution may be its
            residual, 64 channels through the identity.
        by_patches: whether they are for `patch_sm90.cu`, or `stem_sm90.cu`.
    """

    weights: Tensor
    bias: Tensor
    channels: tuple[int, int, int]
    pre: Tensor | None = None
    post: Tensor | None = None
    by_patches: bool = False


def pack(step: ConvStep | StemStep, block: int, dtype: torch.dtype, hopper: bool = True) -> Packed:
    """Choose the kernel of a step that makes high blocks with sides of `block`, and pack for it."""
    weight, cout = step.weight, step.weight.shape[0]
    padded = -(-cout // 8) * 8
    if isinstance(step, StemStep):
        turned = hopper and stem_applies(padded, block) and step.limit == math.inf
        lay_out = patches.pack_patch_weights if turned else pack_weights
        packed = lay_out(_columns(stem_matrix(weight), padded).to(dtype))
        return Packed(packed, _vector(step.bias, packed), (64, 0, padded), by_patches=turned)
    by_patches = hopper and _by_patches(step, block)
    lay_out = patches.pack_patch_weights if by_patches else pack_weights
    missing = -weight.shape[1] % STEP  # of the last input channels that are taken at a time
    matrix = F.pad(weight, (0, 0, 0, 0, 0, missing)).permute(2, 3, 1, 0).reshape(-1, cout)
    packed = lay_out(_columns(matrix, padded).to(dtype), weight.shape[2] ** 2)
    second = None
    if step.extra is not None:
        second = _columns(step.extra_weight.flatten(1).t(), padded)  # CIN2,COUT
    elif by_patches and step.residual is not None:
        second = patches.identity(padded).to(weight.device)
    if second is not None:
        packed = torch.cat((packed, lay_out(second.to(dtype))))
    pre = None if step.pre is None else torch.stack((step.pre.scale, step.pre.shift)).contiguous()
    post = None if step.post is None else _affine(step.post, packed)
    channels = (weight.shape[1], 0 if second is None else second.shape[0], padded)
    return Packed(packed, _vector(step.bias, packed), channels, pre, post, by_patches)


def _by_patches(step: ConvStep, block: int) -> bool:
    if step.pre is not None or step.enlarged is not None or step.stride != 1:
        return False
    if step.limit < math.inf:
        return False
    if step.extra is not None and step.residual is not None:
        return False  # one second input
    extra = step.extra_weight if step.extra is not None else None
    return patches.applies(step.weight, block, extra)


def _columns(matrix: Tensor, columns: int) -> Tensor:
    return F.pad(matrix, (0, columns - matrix.shape[1])).contiguous()


def _vector(vector: Tensor, packed: Tensor) -> Tensor:
    return F.pad(vector.float(), (0, packed.shape[1] - vector.numel()))


def _affine(affine: Affine, packed: Tensor) -> Tensor:
    return torch.stack((_vector(affine.scale, packed), _vector(affine.shift, packed))).contiguous()
