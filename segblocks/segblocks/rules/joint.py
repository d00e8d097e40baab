"""Batch norm over the pixels of several processes: what they tell each other.

Every process calls these for the same batch norms in the same order.
"""

import torch.distributed as dist
from torch import Tensor

from ..ops.batch_norm import batch_statistics
from ..ops.batch_reference import make_table

_MEAN, _INVSTD, _ROWS = 0, 1, 3  # of a table; its last row is free until scale and shift are known


def joint_statistics(
    pixels: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`batch_statistics` of the pixels of all processes; arguments as there.

    Returns:
        The table (4, C), the same in all processes, and this one's share of all pixels, 0-d.
    """
    own = batch_statistics(pixels, None, None, None, None, 0.0, eps)
    own[_ROWS] = pixels.shape[0]
    tables = own.new_empty((dist.get_world_size(), *own.shape))
    # Its name since PyTorch 2.14, and before. Looked up here: a PyTorch may come without either.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(tables.flatten(0, 1), own)
    means, invstds, rows = (tables[:, i].double() for i in (_MEAN, _INVSTD, _ROWS))  # W,C each
    total = rows.sum(0)
    shares = rows / total
    mean = (shares * means).sum(0)
    variances = invstds**-2 - eps + (means - mean) ** 2
    variance = (shares * variances).sum(0).clamp(min=0)
    settings = (running_mean, running_var, momentum, eps)
    table = make_table(variance, mean, total, weight, bias, *settings).to(own.dtype)
    return table, (pixels.shape[0] / total[0]).to(own.dtype)


def joint_sums(sums: Tensor, share: Tensor) -> Tensor:
    """What the sums (2, C) behind the gradient of the statistics are for a process that divides by
    the number of its own pixels, `share` of all: those of all processes, times that share."""
    total = sums.clone()
    dist.all_reduce(total)
    return total * share
