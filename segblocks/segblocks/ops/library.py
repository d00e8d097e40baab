"""Registers the block operations with PyTorch: schema, implementations, shapes and gradients.

Every operation has a PyTorch implementation for any device (`reference.py`) and a CUDA one (the
kernels under `cuda/`), and a function of its own name that computes the output shape for tracing.
"""

import importlib
from collections.abc import Callable

import torch

from . import reference

LIBRARY = torch.library.Library("segblocks", "DEF")


def define(name: str, schema: str, fake: Callable) -> torch._ops.OpOverload:
    """Register `segblocks::name` with the implementations that carry its name in each backend."""
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    LIBRARY.impl(name, _cuda_kernel(name), "CUDA")
    torch.library.register_fake(f"segblocks::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.segblocks, name).default


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


def stored_pixels(cells: torch.Tensor, n_high: int, height: int, width: int) -> int:
    """Pixels of a buffer whose high blocks are height × width and whose low ones half of it."""
    return n_high * height * width + (cells.shape[0] - n_high) * (height // 2) * (width // 2)
