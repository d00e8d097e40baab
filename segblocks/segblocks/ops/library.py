"""Registers the block operations with PyTorch: schema, implementations, shapes and gradients.

Every operation has a PyTorch implementation for any device (`reference.py`) and a CUDA one (the
kernels under `cuda/`), and a function of its own name that computes the output shape for tracing.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import reference

LIBRARY = torch.library.Library("segblocks", "DEF")


def define(name: str, schema: str, fake: Callable, backend: ModuleType = reference) -> Callable:
    """Register `segblocks::name` with the implementations that carry its name: in `backend`, for
    any device, and in `segblocks.ops.cuda`.

    Returns:
        The operation. For a CUDA tensor with nothing to differentiate or to watch it launches the
        kernel itself, because PyTorch's dispatcher takes longer than most of the kernels do.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, getattr(backend, name), "CompositeExplicitAutograd")
    kernel = _cuda_kernel(name)
    LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"segblocks::{name}", fake, lib=LIBRARY)
    operation = getattr(torch.ops.segblocks, name).default

    def call(x: torch.Tensor, *args):
        if launches_directly(x):
            return kernel(x, *args)
        _refuse_tangent(x, name)
        return operation(x, *args)

    return call


def _refuse_tangent(x: torch.Tensor, name: str) -> None:
    """Forward-mode differentiation would go on with zeros, without a word."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"'{name}' of blocks has no forward-mode derivative (torch.func.jvp, make_dual); use "
            "reverse mode, or differentiate the dense network"
        )


def launches_directly(x: torch.Tensor) -> bool:
    """True for a plain CUDA tensor that no gradient, tracer or dispatch mode is interested in."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and not (torch.is_grad_enabled() and x.requires_grad)
        and _get_current_dispatch_mode() is None
    )


def define_gradient(name: str, setup_context: Callable, backward: Callable) -> None:
    """Register the gradient of `segblocks::name`."""
    torch.library.register_autograd(
        f"segblocks::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def _cuda_kernel(name: str) -> Callable:
    # The kernels need CuPy; importing them on first use keeps the package usable without it.
    kernel = None

    def launch(*args):
        nonlocal kernel
        if kernel is None:
            kernel = getattr(importlib.import_module("segblocks.ops.cuda"), name)
        return kernel(*args)

    return launch


def stored_pixels(n_high: int, n_low: int, block: int, more_y: int = 0, more_x: int = 0) -> int:
    """Pixels of a buffer: of high blocks of `block` a side and low ones of half of it, all of them
    `more_y` rows and `more_x` columns larger."""
    half = block // 2
    high = n_high * (block + more_y) * (block + more_x)
    return high + n_low * (half + more_y) * (half + more_x)
