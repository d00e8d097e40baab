"""Validation at label size: accuracy, where the policy looks, operations actually executed."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dataloaders import DatasetInfo
from utils.data import one_by_one
from utils.errors import user_errors
from utils.inference import KeptCopy, use_half
from utils.logger import RunLog, progress
from utils.losses import task_loss
from utils.macs import MacCounter
from utils.oracle import pixel_loss_of
from utils.ranks import ALONE, Ranks
from utils.seeding import forked_rng
from utils.validation import viz
from utils.validation.judge import BlockShares, Judge, block_shares
from utils.validation.metrics import SegmentationMetrics
from utils.validation.passes import VAL_SEED, Passes
from utils.validation.policy_metrics import PolicyFigures, PolicyMetrics
from utils.validation.predict import resize_labels


@dataclass
class Evaluation:
    """Figures of one validation. Shares are of full-resolution blocks, 0 to 1."""

    images: int
    miou: float
    overall_accuracy: float
    mean_accuracy: float
    weighted_accuracy: float
    iou: dict[str, float]  # NaN for classes that no label shows
    share: float
    share_small: float  # among blocks that show a small class (info.small_classes)
    share_plain: float  # among the others
    gmacs: float  # per image, policy included (not what an oracle looks at first)
    gmacs_per_module: dict[str, float] = field(default_factory=dict)
    policy_metrics: PolicyFigures | None = None  # with --policy-metrics

    def scalars(self) -> dict[str, float]:
        """By TensorBoard tag."""
        single = {name: value for name, value in asdict(self).items() if isinstance(value, float)}
        return (
            {f"val/{name}": value for name, value in single.items()}
            | {f"val_iou/{name}": value for name, value in self.iou.items()}
            | {f"val_gmacs/{name}": value for name, value in self.gmacs_per_module.items()}
            | (self.policy_metrics.scalars() if self.policy_metrics else {})
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For the log."""
        iou = ", ".join(f"{name} {100 * value:.1f}" for name, value in self.iou.items())
        lines = [
            f"mIoU {100 * self.miou:.2f} % on {self.images} images; accuracy: overall "
            f"{100 * self.overall_accuracy:.2f} %, mean {100 * self.mean_accuracy:.2f} %, "
            f"frequency-weighted {100 * self.weighted_accuracy:.2f} %",
            f"IoU per class in %: {iou}",
            f"full-resolution blocks: {100 * self.share:.1f} %",
        ]
        if self.share_small == self.share_small:
            lines[-1] += f"; {100 * self.share_small:.1f} % where small classes are"
        if self.share_plain == self.share_plain:
            lines[-1] += f"; {100 * self.share_plain:.1f} % elsewhere"
        modules = ", ".join(f"{name} {macs:.2f}" for name, macs in self.gmacs_per_module.items())
        lines.append(f"GMACs per image: {self.gmacs:.2f} ({modules})")
        return lines + (self.policy_metrics.lines() if self.policy_metrics else [])


class Kept:
    """What one validation of a network leaves to the next: its copy, counts of operations, and
    what judges its outputs, as part of CUDA graphs. `failed`: see TrainingGraphs."""

    def __init__(
        self, args: Namespace, device: torch.device, failed: Callable[[], None] | None = None
    ):
        from_graphs = device.type == "cuda" and args.cuda_graphs
        self.copy = KeptCopy(use_half(args, device), from_graphs, failed)
        self.macs: dict = {}
        self._judge: Judge | None = None

    def judge(self, info: DatasetInfo, block_size: int, device: torch.device) -> Judge:
        """Always the same one."""
        if self._judge is None:
            self._judge = Judge(info, block_size, device)
        return self._judge


def evaluate(
    model: nn.Module,
    loader: DataLoader,
    args: Namespace,
    device: torch.device,
    log: RunLog,
    step: int = 0,
    ranks: Ranks = ALONE,
    kept: Kept | None = None,
) -> Evaluation:
    """Validate a copy of `model` on a `val_loader` and log pictures at `step`.

    `kept` makes the next validation of this network faster.

    Logits are resized bilinearly to the label, as published, which may be larger than the image
    (--val-res); blocks and pictures are of the image. Random numbers, which only the random policy
    draws, are those of VAL_SEED and the image, and leave the state of training as it was. Several
    `ranks` take turns on the images (see `val_loader`); counts are added up, so every rank returns
    the figures of one.
    """
    kept = kept or Kept(args, device)
    model, half = kept.copy.of(model), kept.copy.half
    info = loader.dataset.dataset.info
    judge = kept.judge(info, args.segblocks_block_size, device)
    metrics = SegmentationMetrics(info.num_classes).to(device)
    blocks = BlockShares()
    macs = MacCounter(kept.macs)
    policy_metrics = None
    if args.policy_metrics:
        policy_metrics = PolicyMetrics(info, args.segblocks_block_size, device)
    with user_errors():
        criterion = task_loss(args, info).to(device)
    shown: list[tuple[int, torch.Tensor]] = []

    def gain_of(image: torch.Tensor, at_image: torch.Tensor) -> torch.Tensor | None:
        if model.policy.needs_pixel_loss or (policy_metrics and not model.is_dense):
            return model.block_gain(image, pixel_loss_of(criterion, at_image))
        return None

    passes = Passes(model, judge, device, half, args.budget, gain_of)
    with torch.no_grad(), forked_rng(device, VAL_SEED):
        images, count = one_by_one(loader), len(loader.sampler)
        bar = progress(images, "validate", "img", quiet=not ranks.main, total=count)
        for made in passes(bar):
            judged, size = made.judged, made.image.shape[-2:]
            macs.add(tuple(made.image.shape), judged.n_high, made.again)
            metrics.update(judged.confusion)
            blocks.update(judged.blocks)
            of_image = resize_labels(judged.prediction, size)
            if policy_metrics is not None:
                policy_metrics.update(made.index, of_image, made.at_image, judged, made.gain)
            if made.index < args.num_viz_images:
                seen = (made.image[0], of_image[0], made.at_image[0], judged.grid[0])
                pictures = viz.pictures(*seen, info, args.segblocks_block_size)
                name = Path(loader.dataset.dataset.name_of(made.index)).stem
                for kind in args.viz:  # another file for every image, so each rank writes its own
                    viz.save_picture(log.folder / "viz" / kind / f"{name}.png", pictures[kind])
                if log.tensorboard:
                    together = viz.side_by_side(list(pictures.values()))
                    shown.append((made.index, together.cpu()))
    if args.viz and args.num_viz_images:
        log.info(f"pictures: {log.folder / 'viz'}")
    everyones = ranks.everyones((blocks.counts_on_host(), macs, shown))
    for index, picture in sorted(chain(*(part[2] for part in everyones)), key=itemgetter(0)):
        log.picture(step, f"val/{index}", picture)
    gmacs = MacCounter.joined([part[1] for part in everyones]).gmacs()
    return Evaluation(
        images=len(loader.dataset),
        **metrics.compute(info.classes),
        **block_shares([part[0] for part in everyones]),
        gmacs=gmacs.pop("total"),
        gmacs_per_module=gmacs,
        policy_metrics=None if policy_metrics is None else policy_metrics.compute(ranks),
    )
