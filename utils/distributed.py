"""A model as one of several that share each batch."""

import inspect
import warnings
from argparse import Namespace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from segblocks import convert_sync_batchnorm
from utils.ranks import Ranks

# The name of an option since PyTorch 2.14, and before.
_SYNC_BUFFERS = "broadcast_buffers"
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "forward_sync_buffers"


def distributed(
    model: nn.Module, args: Namespace, device: torch.device, ranks: Ranks
) -> DistributedDataParallel:
    """`model` as one of several that share each batch: gradients, statistics of batch norm and what
    the policy draws are those of the whole batch. The model itself is changed in place."""
    convert_sync_batchnorm(model)
    model.policy.replicas = ranks.replicas
    # Gradients of 1×1 weights come with other strides than the weights, over the same memory.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        **{_SYNC_BUFFERS: False},  # they are equal on all ranks already
        gradient_as_bucket_view=True,
        # All parameters are used. But where it looks for unused ones, it keeps to its first
        # buckets; else it sums in another order after the first step of a run, so that more than
        # two ranks would not repeat to the last bit when they go on from a checkpoint.
        find_unused_parameters=ranks.count > 2 and (args.deterministic or device.type == "cpu"),
    )
