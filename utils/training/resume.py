"""Checkpoints of a run: which one to load, what is in it, what has changed since."""

from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils.checkpoint import DamagedCheckpoint, previous
from utils.download import is_url
from utils.published import settle_upsampling

LATEST = "checkpoint.pth"
BEST = "checkpoint_best.pth"

# None leaves these to the backbone or to the checkpoint.
LEFT_OPEN = frozenset(("num_features", "segblocks_legacy_upsample"))

# Flags that may differ when a run continues: its result does not depend on them.
FREE_FLAGS = frozenset(
    "mode name exp_dir resume resume_best device num_workers log_every val_every save_minutes "
    "max_steps viz num_viz_images profiler debug budget budgets policy_metrics fp16 speed_images "
    "speed_repeats speed_autotune cache_images".split()
)


@dataclass
class Progress:
    """How far a run is. `step` and `total_steps` count optimiser steps."""

    epoch: int = 0
    step: int = 0  # done in this epoch
    total_steps: int = 0
    score_best: float = -1.0
    score_best_epoch: int = -1
    ema_score_best: float = -1.0
    ema_score_best_epoch: int = -1

    def forget_best(self) -> None:
        """As if nothing had been validated yet."""
        self.score_best = self.ema_score_best = -1.0
        self.score_best_epoch = self.ema_score_best_epoch = -1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def folder_of(args: Namespace) -> Path:
    """The folder of the experiment."""
    return Path(args.exp_dir) / args.name


def find_checkpoint(args: Namespace) -> Path | str | None:
    """The file, or its address, that --resume and --resume-best name; None where training starts
    afresh.

    Raises FileNotFoundError for a file that must be there.
    """
    if args.resume_best:
        path = folder_of(args) / BEST
    elif is_auto(args):
        path = folder_of(args) / LATEST
        if args.mode == "train" and not (path.exists() or previous(path).exists()):
            return None
        if args.mode == "train" and not path.exists():
            return previous(path)
    elif args.resume == "none":
        return None
    elif is_url(args.resume):
        return args.resume
    else:
        path = Path(args.resume)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: train the experiment first (--mode train --name "
            f"{args.name}), or name another file with --resume"
        )
    return path


def is_auto(args: Namespace) -> bool:
    """Whether the experiment's own checkpoint is to be found, not a named one."""
    return args.resume in ("", "auto") and not args.resume_best


@dataclass
class Told:
    """What resuming has to say to the user."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def resume(trainer: Any, args: Namespace) -> Told:
    """Continue where --resume says, with `trainer.load(path)`.

    A damaged checkpoint.pth of the experiment gives way to the one before it, with a warning; a
    file that was named must be good. Raises ValueError where none can be used.
    """
    path = find_checkpoint(args)
    if path is None:
        settle_upsampling(trainer.model, args, checkpoint={})
        return Told(["training from the start"])
    try:
        return trainer.load(path)
    except DamagedCheckpoint as error:
        before = previous(Path(path))
        if not (is_auto(args) and before.is_file()):
            raise DamagedCheckpoint(
                f"{error}; --resume names another file, --resume none starts afresh"
            ) from error
        try:
            told = trainer.load(before)
        except DamagedCheckpoint as second:
            raise DamagedCheckpoint(
                f"{error}; and so is the one before it: {second}; --resume none starts afresh, "
                f"--resume {folder_of(args) / BEST} goes on from there, if it is good"
            ) from second
        told.warnings.insert(0, f"{error}: going on from the one before it, {before}")
        return told


def changed_flags(saved: dict[str, Any], args: Namespace) -> list[str]:
    """Flags that change the result and differ from those of the checkpoint, one text each. The new
    values are those that count."""
    now = vars(args)
    return [
        f"--{name.replace('_', '-')} was {saved[name]}, now {now[name]}"
        for name in sorted(saved.keys() & now.keys() - FREE_FLAGS)
        if not name.endswith("_data_dir")  # the same data may have moved
        and not (name in LEFT_OPEN and None in (saved[name], now[name]))
        and _plain(saved[name]) != _plain(now[name])
    ]


def other_blocks(args: Namespace, checkpoint: dict[str, Any]) -> list[str]:
    """What to tell where a policy that has learned is to choose blocks of another size."""
    flags = checkpoint.get("args")
    if args.segblocks_policy != "reinforce" or not isinstance(flags, dict):
        return []
    trained, now = flags.get("segblocks_block_size"), args.segblocks_block_size
    if trained in (None, now) or flags.get("segblocks_policy") != "reinforce":
        return []
    return [
        f"warning: the policy was trained for blocks of {trained} pixels, not of {now}: "
        f"--segblocks-block-size {trained} is what it knows"
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
