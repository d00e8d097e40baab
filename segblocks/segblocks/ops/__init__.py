"""The block operations: one file an operation, a PyTorch reference and CUDA kernels behind each."""

from .blockpad import blockpad
from .combine import combine
from .cross_entropy import pixel_cross_entropy
from .slots import build_slots, choose_slots, select_budget
from .split import split
from .upsample import upsample

__all__ = [
    "blockpad",
    "build_slots",
    "choose_slots",
    "combine",
    "pixel_cross_entropy",
    "select_budget",
    "split",
    "upsample",
]
