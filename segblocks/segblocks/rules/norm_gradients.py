"""What autograd knows of a batch norm in training whose table is there; see `normalised.py`.

A second derivative raises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..once import differentiable_once
from ..ops.batch_norm import batch_gradients, batch_normalise
from .joint import joint_sums


class BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pixels: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        addend: Tensor | None,
        table: Tensor,
        share: Tensor | None,
        relu: bool,
    ) -> Tensor:
        out = batch_normalise(pixels, table, addend, relu)
        kept = (out,) if relu and addend is not None else ()
        ctx.save_for_backward(pixels, table, share, *kept)
        ctx.relu = relu
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple:
        pixels, table, share, *kept = ctx.saved_tensors
        for_pixels, for_weight, for_bias, for_addend, *_ = ctx.needs_input_grad
        grad, output = grad.contiguous(), kept[0] if kept else None
        masked = for_addend and ctx.relu
        wanted = (for_pixels, masked, _of_all(share))
        inputs, addend, sums = batch_gradients(grad, pixels, table, output, ctx.relu, *wanted)
        if for_addend and not masked:
            addend = grad
        parameters = (sums[1] if for_weight else None, sums[0] if for_bias else None)
        return inputs, *parameters, addend, None, None, None


class Edge(torch.autograd.Function):
    """`BatchNorm` without an output: who follows makes it himself."""

    @staticmethod
    def forward(
        ctx: Any,
        pixels: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        table: Tensor,
        share: Tensor | None,
        relu: bool,
    ) -> Tensor:
        ctx.save_for_backward(pixels, table, share)
        ctx.relu = relu
        return pixels.new_empty((1, 1)).expand(pixels.shape)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple:
        pixels, table, share = ctx.saved_tensors
        for_pixels, for_weight, for_bias, *_ = ctx.needs_input_grad
        wanted = (for_pixels, False, _of_all(share))
        inputs, _, sums = batch_gradients(grad.contiguous(), pixels, table, None, ctx.relu, *wanted)
        parameters = (sums[1] if for_weight else None, sums[0] if for_bias else None)
        return inputs, *parameters, None, None, None


def _of_all(share: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """The sums over the pixels of all processes; None where there is one."""
    return None if share is None else partial(joint_sums, share=share)
