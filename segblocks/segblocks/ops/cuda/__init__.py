"""CUDA twins of `segblocks.ops.reference`: one `.cu` file and one launcher module per operation.

Importing this needs neither CuPy nor a GPU; the first launch does.
"""

from .batch_norm import (
    batch_gradient_sums,
    batch_join,
    batch_normalise,
    batch_normalise_backward,
    batch_statistics,
)
from .blockpad import blockpad, blockpad_backward, blockpad_normalised
from .combine import combine, combine_backward
from .cross_entropy import pixel_cross_entropy, pixel_cross_entropy_backward
from .grid import build_slots, choose_slots, select_budget
from .pool_blocks import max_pool, max_pool_backward
from .split import split, split_backward
from .turn_weight import turn_weight
from .upsample import upsample, upsample_backward
from .windows import gather_windows, sum_windows

__all__ = [
    "batch_gradient_sums",
    "batch_join",
    "batch_normalise",
    "batch_normalise_backward",
    "batch_statistics",
    "blockpad",
    "blockpad_backward",
    "blockpad_normalised",
    "build_slots",
    "choose_slots",
    "combine",
    "combine_backward",
    "gather_windows",
    "max_pool",
    "max_pool_backward",
    "pixel_cross_entropy",
    "pixel_cross_entropy_backward",
    "select_budget",
    "split",
    "split_backward",
    "sum_windows",
    "turn_weight",
    "upsample",
    "upsample_backward",
]
