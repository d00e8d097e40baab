"""Gradients that cannot be differentiated again say so."""

import functools
from collections.abc import Callable
from typing import Any

import torch

_MESSAGE = (
    b"a second derivative through blocks: convolution, pooling and batch norm on blocks have a "
    b"first one only; take it outside execute_with_grid, or run the dense network"
)


def differentiable_once(backward: Callable) -> Callable:
    """For `backward` of an autograd.Function. Differentiating its result raises.

    `torch.autograd.function.once_differentiable` does so only if the gradient that enters requires
    one itself; weights and inputs that were saved may require one as well.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        fail = torch._C._functions.DelayedError(_MESSAGE, len(outputs))
        return fail(*(x if x is None else x.detach().requires_grad_() for x in outputs))

    return wrapper
