"""Everything the next optimiser step of a run depends on, saved and restored."""

import copy
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoint import load_weights
from utils.download import is_url
from utils.published import is_published, settle_upsampling
from utils.seeding import rng_state, set_rng_state
from utils.training.ema import WeightAverage
from utils.training.optim import CosineSchedule, build_optimizer, restore
from utils.training.resume import Progress, Told, changed_flags, folder_of


def images_per_step(flags: Mapping[str, Any]) -> int:
    """Images that one optimiser step takes, over all ranks."""
    return flags["batch_size"] * flags["accumulate"]


class TrainingState:
    """Weights, optimiser, schedule, loss scaler, average of weights, what the reward counts by,
    progress and generators.

    Nothing of it differs between ranks.

    Attributes:
        before: what the policy's network was when --segblocks-refine-epochs began; None until then.
    """

    def __init__(self, model: nn.Module, args: Namespace, device: torch.device, reward: nn.Module):
        self.model, self.args, self.device, self.reward = model, args, device, reward
        self.optimizer = build_optimizer(model, args)
        self.schedule = CosineSchedule(self.optimizer, args)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.average = WeightAverage(model, args.ema) if args.ema else None
        self.before: nn.Module | None = None
        self.progress = Progress()

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state = {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "reward": dict(self.reward.state_dict()),
            "progress": self.progress.to_dict(),
            "rng": rng_state(self.device),
            "args": vars(self.args),
        }
        if self.average:
            state["ema"] = self.average.state_dict()
        if self.before is not None:
            state["policy_before"] = self.before.state_dict()
        return state

    def policy_before(self) -> nn.Module:
        """`before`, the network as it is now if there is none yet."""
        if self.before is None:
            self.before = copy.deepcopy(self.model.policy.policy_net).eval().requires_grad_(False)
        return self.before

    def load(self, path: Path | str) -> Told:
        """Continue from a checkpoint of a training run, or begin with published weights.

        Returns what to tell its user: where it goes on, and flags that have changed since. Raises
        ValueError if the file holds no training state or that of another architecture.
        """
        state = load_weights(self.model, path)
        resizing = settle_upsampling(self.model, self.args, state)
        if is_published(state):
            if self.average:
                self.average.restart()
            told = f"published weights {path}: optimiser and schedule start afresh, epoch 1, step 0"
            return Told([told, *resizing])
        missing = sorted(self.to_dict().keys() - state.keys() - {"ema", "reward"})
        if missing:
            raise ValueError(
                f"{path} cannot be trained further: it lacks {', '.join(missing)}; resume from a "
                "checkpoint that this program's training wrote, or start afresh with --resume none"
            )
        restore(self.optimizer, self.schedule, state)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        counts = state.get("reward", {})
        if counts.keys() == self.reward.state_dict().keys():  # else it was another reward
            self.reward.load_state_dict(counts)
        if self.average and "ema" in state:
            self.average.load_state_dict(state["ema"])
        elif self.average:
            self.average.restart()
        self.progress = Progress(**state["progress"])
        self.before = None
        if "policy_before" in state and self.progress.epoch >= self.schedule.refine_from:
            self.policy_before().load_state_dict(state["policy_before"])
        if is_url(str(path)) or Path(path).resolve().parent != folder_of(self.args).resolve():
            self.progress.forget_best()  # of another experiment, whose folder has those weights
        # With batches of another size, about as far in the epoch as before.
        samples = self.progress.step * images_per_step(state["args"])
        self.progress.step = samples // images_per_step(vars(self.args))
        set_rng_state(state["rng"], self.device)
        at = self.progress
        told = f"resumed {path}: epoch {at.epoch + 1}, step {at.step}"
        changed = changed_flags(state["args"], self.args)
        return Told(
            [told, *resizing], [f"changed since the checkpoint: {text}" for text in changed]
        )
