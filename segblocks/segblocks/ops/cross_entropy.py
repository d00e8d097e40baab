"""`pixel_cross_entropy`: the loss of every pixel, the logits enlarged on the way.

Enlarged logits are the largest tensor of a training step. The CUDA kernels compute them where they
are read, forward and backward, and keep two numbers a pixel.
"""

import torch
from torch import Tensor

from . import reference
from .library import define, define_gradient

_MAPS = "Tensor logits, Tensor target"


def _fake(logits, target, ignore_index):
    dtype = reference.loss_dtype(logits.dtype)
    return tuple(logits.new_empty(target.shape, dtype=dtype) for _ in range(2))


def _fake_backward(grad, logits, target, log_sums, ignore_index):
    return torch.empty_like(logits)


_forward = define("pixel_cross_entropy", f"({_MAPS}, int ignore_index) -> (Tensor, Tensor)", _fake)
_backward_of = define(
    "pixel_cross_entropy_backward",
    f"(Tensor grad, {_MAPS}, Tensor log_sums, int ignore_index) -> Tensor",
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    logits, target, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None
    return _backward_of(grad, *ctx.saved_tensors, ctx.ignore_index), None, None


define_gradient("pixel_cross_entropy", _setup_context, _backward)


def pixel_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of every pixel.

    Args:
        logits: (N, C, h, w) float16, bfloat16, float32 or float64 in any memory layout; resized
            bilinearly (align_corners=False) to the size of `target`, in float32 or float64.
        target: (N, H, W) int64 class ids below C, or `ignore_index`. On CUDA another id makes the
            loss and the gradient NaN; on the CPU it raises IndexError.

    Returns:
        (N, H, W) float32 (float64 for float64 logits), 0 at ignored pixels. Can be differentiated
        once by `logits`; the CUDA gradient is the same bit for bit every time.

    Raises:
        TypeError, ValueError: on CUDA, dtypes, shapes or devices that do not fit; elsewhere what
            PyTorch's functions raise.
    """
    if logits.is_cuda:
        return _forward(logits, target, ignore_index)[0]
    # Autograd keeps the log-softmax, which our backward would compute a second time.
    return reference.cross_entropy_of(reference.enlarged(logits, target), target, ignore_index)
