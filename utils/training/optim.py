"""Optimiser and schedule of the published training."""

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from segblocks.capturing import without_collection


def build_optimizer(model: nn.Module, args: Namespace) -> Adam:
    """Adam with the published groups, named decoder, backbone and policy.

    The decoder takes --lr and --weight-decay; a pretrained backbone a quarter of both
    (--lr-finetune-factor), one from scratch the same as the decoder; the policy its own factors.
    A group without parameters is left out. On CUDA rates are 0-d tensors, so that a step may be
    part of a CUDA graph.
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
    first = next(model.parameters())

    def rate(value: float) -> float | Tensor:
        return torch.tensor(value, device=first.device) if first.is_cuda else value

    return Adam(
        [
            {
                "name": name,
                "params": parameters,
                "lr": rate(args.lr * factors[name][0]),
                "weight_decay": args.weight_decay * factors[name][1],
            }
            for name, parameters in groups.items()
            if parameters
        ],
        betas=(0.5, 0.999),
        fused=first.is_cuda,
        capturable=first.is_cuda,
    )


def group_of(name: str) -> str:
    """The optimiser group of a parameter of SegBlocksModel, by its name."""
    if name.startswith("policy."):
        return "policy"
    return "backbone" if name.startswith("net.backbone.") else "decoder"


class CosineSchedule:
    """Cosine annealing, one step per epoch, from each group's rate to --lr-end; a rate of 0 stays.
    The policy's takes --segblocks-policy-epochs, if they are fewer, and is 0 from then on. In the
    last --segblocks-refine-epochs it begins again.

    In closed form, so that the rates of an epoch follow from the flags alone and not from how the
    run came there, as those of PyTorch's scheduler do.

    Attributes:
        now: the rates of this epoch, by name of their group; on the host, where those of an
            optimiser in a CUDA graph are not.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, args: Namespace):
        self.optimizer, self.epochs, self.end = optimizer, args.epochs, args.lr_end
        self.refine_from = args.epochs - args.segblocks_refine_epochs
        self.policy_epochs = min(args.segblocks_policy_epochs or args.epochs, self.refine_from)
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.now: dict[str, float] = {}
        self.go_to(0)

    def go_to(self, epoch: int) -> None:
        """Set the rates of an epoch, counted from 0."""
        self.epoch = epoch
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            first, last = 0, self.epochs
            if group["name"] == "policy" and epoch >= self.refine_from < self.epochs:
                first = self.refine_from
            elif group["name"] == "policy":
                last = self.policy_epochs
            rests = last < self.epochs and last <= epoch
            left = (1 + math.cos(math.pi * (min(epoch, last) - first) / (last - first))) / 2
            now = self.end + (rate - self.end) * left if rate and not rests else 0.0
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(now)
            else:
                group["lr"] = now
            self.now[group["name"]] = now

    def step(self) -> None:
        """On to the next epoch."""
        self.go_to(self.epoch + 1)

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.epoch}


def restore(
    optimizer: torch.optim.Optimizer, schedule: CosineSchedule, saved: Mapping[str, Any]
) -> None:
    """Take moments and epoch from a checkpoint, everything else (rates, decay, schedule) from the
    flags that both were built with. Raises ValueError for an optimiser of other groups."""
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except ValueError as error:
        raise ValueError(
            "the checkpoint's optimiser is of other parameters than this run's, which "
            "--segblocks-policy decides on; give that of the checkpoint, or start afresh with "
            "--resume none"
        ) from error
    for group, flags in zip(optimizer.param_groups, own):
        group.update(flags)
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            for name, value in state.items():  # moments lie as the parameter does, for one pass
                if isinstance(value, Tensor) and value.shape == p.shape:
                    state[name] = torch.empty_like(p).copy_(value)
            if "step" in state and group.get("capturable"):  # a run on the CPU counts there
                state["step"] = state["step"].to(p.device, torch.float32)
    schedule.go_to(saved["scheduler"]["last_epoch"])


class GraphedStep:
    """`optimizer.step()` from a CUDA graph, as long as weights, gradients and moments lie where
    they lay and its settings are the same.

    The optimiser must be capturable, with rates that are tensors.
    """

    MOST = 8  # captures; where gradients move more often than that, steps run as written

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._state = optimizer.state
        self._stream: torch.cuda.Stream | None = None
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    def __call__(self) -> None:
        if self._state is not self.optimizer.state:  # a checkpoint was loaded: other moments
            self._state = self.optimizer.state
            self.graphs.clear()
        gradients = (0 if p.grad is None else p.grad.data_ptr() for p in self._parameters)
        groups = self.optimizer.param_groups
        numbers = (v for g in groups for k, v in g.items() if k != "params")
        numbers = (v.data_ptr() if isinstance(v, Tensor) else v for v in numbers)
        setting = (*map(Tensor.data_ptr, self._parameters), *gradients, *numbers)
        graph = self.graphs.get(setting)
        if graph is None and self._may_capture():
            graph = self.graphs[setting] = self._capture()
        if graph is None:
            self.optimizer.step()
        else:
            graph.replay()
            # Whoever keeps what he has made of weights asks them whether they have changed.
            torch.autograd.graph.increment_version(self._parameters)

    def _capture(self) -> torch.cuda.CUDAGraph:
        device = self._parameters[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        graph = torch.cuda.CUDAGraph()
        # Threads that pin memory for the next batch go on meanwhile.
        capture = torch.cuda.graph(graph, None, self._stream, capture_error_mode="thread_local")
        with without_collection(), torch.cuda.device(device), capture:
            self.optimizer.step()
        return graph

    def _may_capture(self) -> bool:
        # Moments that a step makes are not for a graph, which would make them again each time.
        state = self.optimizer.state
        known = all(p in state for p in self._parameters if p.grad is not None)
        return known and len(self.graphs) < self.MOST
