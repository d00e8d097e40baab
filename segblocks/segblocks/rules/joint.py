"""Batch norm over the pixels of several processes: what they tell each other.

Every process calls these for the same batch norms in the same order.
"""

import torch.distributed as dist
from torch import Tensor

from ..ops.batch_norm import batch_join, batch_statistics
from ..ops.cuda import joint_norm
from ..peers import peers_of


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
    settings = (running_mean, running_var, momentum, eps)
    peers = peers_of(own)
    if peers is not None:
        return joint_norm.joint_table(peers, own, pixels.shape[0], weight, bias, *settings)
    own[-1] = pixels.shape[0]  # the last row is free until scale and shift are known
    tables = own.new_empty((dist.get_world_size(), *own.shape))
    # Its name since PyTorch 2.14, and before. Looked up here: a PyTorch may come without either.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(tables.flatten(0, 1), own)
    return batch_join(tables, pixels.shape[0], weight, bias, *settings)


def joint_sums(sums: Tensor, share: Tensor) -> Tensor:
    """What the sums (2, C) behind the gradient of the statistics are for a process that divides by
    the number of its own pixels, `share` of all: those of all processes, times that share."""
    peers = peers_of(sums)
    if peers is not None:
        return joint_norm.joint_sums(peers, sums, share)
    total = sums.clone()
    dist.all_reduce(total)
    return total * share
