"""Optimiser and schedule of the published training."""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(model: nn.Module, args: Namespace) -> Adam:
    """Adam with the published groups, named decoder, backbone and policy.

    The decoder takes --lr and --weight-decay; a pretrained backbone a quarter of both
    (--lr-finetune-factor), one from scratch the same as the decoder; the policy its own factors.
    A group without parameters is left out.
    """
    groups: dict[str, list[nn.Parameter]] = {"decoder": [], "backbone": [], "policy": []}
    for name, parameter in model.named_parameters():
        groups[group_of(name)].append(parameter)
    backbone = args.lr_finetune_factor if args.pretrain_backbone else 1.0
    factors = {
        "decoder": (1.0, 1.0),
        "backbone": (backbone, backbone),
        "policy": (args.segblocks_policy_lr_factor, args.segblocks_policy_wd_factor),
    }
    return Adam(
        [
            {
                "name": name,
                "params": parameters,
                "lr": args.lr * factors[name][0],
                "weight_decay": args.weight_decay * factors[name][1],
            }
            for name, parameters in groups.items()
            if parameters
        ],
        betas=(0.5, 0.999),
        fused=_on_cuda(model),
    )


def group_of(name: str) -> str:
    """The optimiser group of a parameter of SegBlocksModel, by its name."""
    if name.startswith("policy."):
        return "policy"
    return "backbone" if name.startswith("net.backbone.") else "decoder"


def build_scheduler(optimizer: torch.optim.Optimizer, args: Namespace) -> LambdaLR:
    """Cosine annealing, one step per epoch, from each group's rate to --lr-end.

    In closed form, so that the rate of an epoch follows from the flags alone and not from how the
    run came there.
    """

    def cosine(rate: float) -> Callable[[int], float]:
        def share(epoch: int) -> float:
            falling = (1 + math.cos(math.pi * min(epoch, args.epochs) / args.epochs)) / 2
            return (args.lr_end + (rate - args.lr_end) * falling) / rate if rate else 0.0

        return share

    return LambdaLR(optimizer, [cosine(group["lr"]) for group in optimizer.param_groups])


def restore(
    optimizer: torch.optim.Optimizer, scheduler: LambdaLR, saved: Mapping[str, Any]
) -> None:
    """Take moments and epoch from a checkpoint, everything else (rates, decay, schedule) from the
    flags that both were built with. Raises ValueError for an optimiser of other groups."""
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.last_epoch = saved["scheduler"]["last_epoch"]
    for group, flags, rate, share in zip(
        optimizer.param_groups, own, scheduler.base_lrs, scheduler.lr_lambdas
    ):
        group.update(flags)
        group["lr"] = rate * share(scheduler.last_epoch)


def _on_cuda(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda
