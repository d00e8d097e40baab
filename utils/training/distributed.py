"""A model as one of several that share each batch: how its gradients become those of the whole."""

import inspect
import warnings
from argparse import Namespace
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segblocks import convert_sync_batchnorm
from segblocks.capture import layout
from segblocks.peers import peers_on
from utils.ranks import Ranks

# The name of an option since PyTorch 2.14, and before.
_SYNC_BUFFERS = "broadcast_buffers"
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "forward_sync_buffers"


class Alone:
    """The model is the only one.

    Attributes:
        network: what to call in training.
        weight: factor of this process's loss, where losses of all add up.
    """

    weight = 1.0

    def __init__(self, network: nn.Module):
        self.network = network

    def meet(self) -> None:
        """Before a forward pass, with its batch at hand."""

    def later(self) -> AbstractContextManager:
        """Backward passes inside are not the last ones before a step."""
        return nullcontext()

    def exchange(self) -> None:
        """After the last backward pass before a step: every `.grad` is of the whole batch now."""


class _WithBackward(Alone):
    """PyTorch's own way, which sends gradients off as the backward pass finds them."""

    network: DistributedDataParallel

    def __init__(
        self, model: nn.Module, args: Namespace, device: torch.device, ranks: Ranks
    ) -> None:
        # Gradients of 1×1 weights come with other strides than the weights, over the same memory.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        network = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            **{_SYNC_BUFFERS: False},  # they are equal on all ranks already
            gradient_as_bucket_view=True,
            # All parameters are used. But where it looks for unused ones, it keeps to its first
            # buckets; else it sums in another order after the first step of a run, so that more
            # than two ranks would not repeat to the last bit when they go on from a checkpoint.
            find_unused_parameters=ranks.count > 2 and (args.deterministic or device.type == "cpu"),
        )
        super().__init__(network)
        self.weight = float(ranks.count)  # it averages
        reached = device.type == "cuda" and peers_on(device.index) is not None
        self._here = torch.zeros((), device=device) if reached else None

    def meet(self) -> None:
        # Watched, as below: what is exchanged in memory of the GPUs is not.
        if self._here is not None:
            dist.all_reduce(self._here)

    def later(self) -> AbstractContextManager:
        return self.network.no_sync()


class _AfterBackward(Alone):
    """Gradients are added up when all are there, as those out of a CUDA graph are at once."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, 0)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._layouts: Hashable = None
        self._here = torch.zeros((), device=self._parameters[0].device)

    def meet(self) -> None:
        # PyTorch watches this exchange, which ends the run some minutes after a rank was lost.
        # Those in graphs it does not see, and the host may wait for one of them.
        dist.all_reduce(self._here)

    def exchange(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        layouts = tuple(map(layout, gradients))
        if layouts != self._layouts:
            self._layouts, self._sum = layouts, _side_by_side(gradients)
        whole, parts = self._sum
        torch._foreach_copy_(parts, gradients)
        dist.all_reduce(whole)
        torch._foreach_copy_(gradients, parts)


def _side_by_side(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One dimension, and views of it like each of the tensors, which lie dense in memory."""
    whole = tensors[0].new_empty(sum(t.numel() for t in tensors))
    pieces = whole.split([t.numel() for t in tensors])
    return whole, [piece.as_strided(t.shape, t.stride()) for piece, t in zip(pieces, tensors)]


def share_batch(
    model: nn.Module, args: Namespace, device: torch.device, ranks: Ranks, from_graphs: bool
) -> Alone:
    """Make `model`, in place, one of several that share each batch, if there are several:
    gradients, statistics of batch norm and what the policy draws are those of the whole batch.

    `from_graphs`: whether gradients come out of CUDA graphs, which no hook of a parameter sees.
    """
    if ranks.count == 1:
        return Alone(model)
    convert_sync_batchnorm(model)
    if device.type == "cuda":
        peers_on(device.index)  # before graphs, in which they cannot meet
    model.policy.replicas = ranks.replicas
    return _AfterBackward(model) if from_graphs else _WithBackward(model, args, device, ranks)
