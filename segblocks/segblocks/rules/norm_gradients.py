"""What autograd knows of a batch norm in training whose table is there; see `normalised.py`.

A second derivative raises.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.batch_norm import batch_gradients, batch_normalise


class BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pixels: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        addend: Tensor | None,
        table: Tensor,
        relu: bool,
    ) -> Tensor:
        out = batch_normalise(pixels, table, addend, relu)
        kept = (out,) if relu and addend is not None else ()
        ctx.save_for_backward(pixels, table, *kept)
        ctx.relu = relu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        pixels, table, *kept = ctx.saved_tensors
        for_pixels, for_weight, for_bias, for_addend, *_ = ctx.needs_input_grad
        grad, output = grad.contiguous(), kept[0] if kept else None
        masked = for_addend and ctx.relu
        wanted = (for_pixels, masked)
        inputs, addend, sums = batch_gradients(grad, pixels, table, output, ctx.relu, *wanted)
        if for_addend and not masked:
            addend = grad
        parameters = (sums[1] if for_weight else None, sums[0] if for_bias else None)
        return inputs, *parameters, addend, None, None


class Edge(torch.autograd.Function):
    """`BatchNorm` without an output: who follows makes it himself."""

    @staticmethod
    def forward(
        ctx: Any,
        pixels: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        table: Tensor,
        relu: bool,
    ) -> Tensor:
        ctx.save_for_backward(pixels, table)
        ctx.relu = relu
        return pixels.new_empty((1, 1)).expand(pixels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        pixels, table = ctx.saved_tensors
        for_pixels, for_weight, for_bias, *_ = ctx.needs_input_grad
        inputs, _, sums = batch_gradients(
            grad.contiguous(), pixels, table, None, ctx.relu, for_pixels, False
        )
        return inputs, sums[1] if for_weight else None, sums[0] if for_bias else None, None, None
