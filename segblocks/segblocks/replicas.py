"""Processes that train one model together: what is summed over all of them, what each one draws."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Replicas:
    """The place of this process among those that share a training batch.

    Of the images of the whole batch, process `index` of `count` holds every `count`-th, from
    number `index` on. More than one need an initialised `torch.distributed`.
    """

    index: int = 0
    count: int = 1

    def total(self, x: Tensor) -> Tensor:
        """`x`, of any shape, summed over the processes; carries no gradient."""
        x = x.detach()
        if self.count > 1:
            x = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(x)
        return x

    def uniform(self, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """(N, Gh, Gw) float32 from 0 to 1 for this process's N images.

        Every process draws for the whole batch and keeps its own part. With equal generators, what
        an image gets then does not depend on how many processes share the batch.
        """
        n, gh, gw = shape
        return torch.rand((n * self.count, gh, gw), device=device)[self.index :: self.count]
