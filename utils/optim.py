"""Optimiser and schedule of the published training."""

from argparse import Namespace

import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR


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


def build_scheduler(optimizer: torch.optim.Optimizer, args: Namespace) -> CosineAnnealingLR:
    """Cosine annealing, one step per epoch, from each group's rate to --lr-end."""
    return CosineAnnealingLR(optimizer, T_max=args.epochs, eta_min=args.lr_end)


def _on_cuda(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda
