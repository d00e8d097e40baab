"""Segmentation losses: a scalar to train on and a per-pixel map that policies learn from.

Every loss is called as `loss(logits, target) -> (scalar, loss_map)`. Where several processes share
a batch, the scalars of all of them add up to the loss of the whole batch.
"""

import math
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataloaders.info import DatasetInfo
from segblocks import ops
from utils.class_weights import class_weights

Total = Callable[[Tensor], Tensor]


def own_count(count: Tensor) -> Tensor:
    """The total of one process."""
    return count


def pixel_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of every pixel.

    logits (N,classes,h,w), floating, are resized bilinearly (corners not aligned) to the size of
    target (N,H,W), int64. Returns (N,H,W), float32 (float64 for float64 logits), 0 at ignored
    pixels; half-precision logits are computed with in float32. Raises ValueError if shapes or
    dtypes do not fit; label ids are checked on the CPU only, because on CUDA that would wait for
    the device: there the loss of an id that is no class is NaN.
    """
    _check(logits, target, ignore_index)
    return ops.pixel_cross_entropy(logits, target, ignore_index)


class PixelLoss(nn.Module):
    """What the losses share: ignored pixels, class weights, processes.

    `weight` (classes,) gives every class a weight, by default 1. Means are weighted means, so only
    the proportions of weights matter. A loss map is the cross-entropy times the weight over the
    mean weight of the batch's valid pixels: its mean over valid pixels is the weighted
    cross-entropy, and its scale, which policies weigh against the share of blocks, is that of a
    loss without weights. `total` adds a count up over the processes that share the batch.
    """

    weight: Tensor | None

    def __init__(
        self, ignore_index: int = 255, weight: Tensor | None = None, total: Total = own_count
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.total = total
        self.register_buffer("weight", weight, persistent=False)

    def pixels(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, weight and validity of every pixel, (N,H,W) each; ignored ones weigh 0."""
        losses = pixel_cross_entropy(logits, target, self.ignore_index)
        valid = target != self.ignore_index
        if self.weight is None:
            return losses, valid.to(losses.dtype), valid
        if len(self.weight) != logits.shape[1]:
            raise ValueError(
                f"{len(self.weight)} class weights for logits of {logits.shape[1]} classes"
            )
        return losses, pixel_weights(self.weight.to(losses.dtype), target, valid), valid

    def loss_map(self, losses: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
        """(N,H,W), without gradient, 0 at ignored pixels."""
        if self.weight is None:
            return losses.detach()
        return losses.detach() * weights * mean_of_one(weights, valid, self.total)


class CrossEntropy(PixelLoss):
    """Cross-entropy, averaged over the valid pixels of the batch.

    (logits (N,classes,h,w), target (N,H,W) int64) -> (loss (), loss_map (N,H,W)). The map is
    0 at ignored pixels and carries no gradient. A batch without a valid pixel has loss 0.
    """

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses, weights, valid = self.pixels(logits, target)
        loss = _divide((losses * weights).sum(), self.total(weights.sum()))
        return loss, self.loss_map(losses, weights, valid)


class BootstrappedCrossEntropy(PixelLoss):
    """Cross-entropy over the hardest pixels of each image, averaged over the images.

    Of each image: the pixels whose loss exceeds `threshold` if the k-th largest loss does, else
    the `k` pixels with the largest loss; all valid pixels where there are fewer than k. Class
    weights do not change which pixels are the hardest. Images without a valid pixel take no part
    in the average; a batch without one has loss 0. Shapes as for `CrossEntropy`. (After Wu et al.,
    "Bridging Category-level and Instance-level Semantic Image Segmentation", 2016, section 2.2.)
    """

    def __init__(
        self,
        k: int = 4096,
        threshold: float = 0.3,
        ignore_index: int = 255,
        weight: Tensor | None = None,
        total: Total = own_count,
    ):
        super().__init__(ignore_index, weight, total)
        if k < 1:
            raise ValueError(f"k is {k}; the bootstrapped loss needs at least one pixel per image")
        if threshold < 0:
            raise ValueError(f"threshold is {threshold}; a cross-entropy is never below 0")
        self.k = k
        self.threshold = threshold

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses, weights, valid = self.pixels(logits, target)
        rows = (tensor.flatten(1) for tensor in (losses, weights, valid))  # N,H*W
        per_image = _divide(*_hardest(*rows, self.k, self.threshold))  # N
        images = self.total(valid.flatten(1).any(dim=1).sum())
        return per_image.sum() / images.clamp(min=1), self.loss_map(losses, weights, valid)


class OhemCrossEntropy(PixelLoss):
    """Online hard example mining: cross-entropy over the pixels of a batch that are not yet easy.

    Kept are the pixels whose true class has a probability below `threshold`, or, where these are
    fewer than `min_kept` per image of the batch, that many pixels of lowest probability; all valid
    pixels where there are fewer. Class weights do not change which pixels are kept. Where several
    processes share a batch, each chooses among its own images. A batch without a valid pixel has
    loss 0. Shapes as for `CrossEntropy`. (After Shrivastava et al., "Training
    Region-based Object Detectors with Online Hard Example Mining", 2016.)
    """

    def __init__(
        self,
        threshold: float = 0.7,
        min_kept: int = 100_000,
        ignore_index: int = 255,
        weight: Tensor | None = None,
        total: Total = own_count,
    ):
        super().__init__(ignore_index, weight, total)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; give a probability above 0, at most 1")
        if min_kept < 1:
            raise ValueError(f"min_kept is {min_kept}; give at least one pixel per image")
        self.threshold = threshold
        self.min_kept = min_kept

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses, weights, valid = self.pixels(logits, target)
        batch = (tensor.reshape(1, -1) for tensor in (losses, weights, valid))  # 1,N*H*W
        # A probability below the threshold is a cross-entropy above its negative logarithm.
        limit = -math.log(self.threshold)
        loss, weight = _hardest(*batch, self.min_kept * len(target), limit)
        return _divide(loss[0], self.total(weight[0])), self.loss_map(losses, weights, valid)


def _hardest(
    losses: Tensor, weights: Tensor, valid: Tensor, count: int, limit: float
) -> tuple[Tensor, Tensor]:
    """Weighted sum and sum of weights (R,) of the hardest pixels of each row of (R,M): of losses
    above `limit` if at least `count` are, else of the `count` largest, all valid ones at most."""
    # Ignored pixels sort last; everything stays on the device, without a data-dependent shape.
    ranked = losses.masked_fill(~valid, -1.0)
    hardest, at = ranked.topk(min(count, ranked.shape[1]), dim=1)  # R,count
    enough = hardest[:, -1] > limit
    of_hardest, above = weights.gather(1, at), weights * (losses > limit)
    total = torch.where(enough, (losses * above).sum(1), (hardest * of_hardest).sum(1))
    return total, torch.where(enough, above.sum(1), of_hardest.sum(1))


def pixel_weights(of_class: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The weight of each pixel's class (N,H,W), 0 where it is not valid."""
    return of_class[target.masked_fill(~valid, 0)] * valid


def mean_of_one(weights: Tensor, valid: Tensor, total: Total = own_count) -> Tensor:
    """What to multiply by so that the mean weight of the batch's valid pixels is 1, 0-d."""
    pixels, weight = total(torch.stack([valid.sum().to(weights.dtype), weights.sum()]))
    return _divide(pixels, weight)


def _divide(value: Tensor, by: Tensor) -> Tensor:
    """value / by, 0 where `by` is 0."""
    return value / by.masked_fill(by == 0, 1)


LOSSES = {
    "crossentropy": CrossEntropy,
    "bootstrap_ce": BootstrappedCrossEntropy,
    "ohem": OhemCrossEntropy,
}


def build_loss(
    name: str,
    ignore_index: int = 255,
    weight: Tensor | None = None,
    total: Total = own_count,
    **options: float,
) -> nn.Module:
    """The loss called `name`, with its own `options`; raises ValueError for an unknown name."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(LOSSES)}")
    return LOSSES[name](ignore_index=ignore_index, weight=weight, total=total, **options)


def task_loss(args: Namespace, info: DatasetInfo, total: Total = own_count) -> nn.Module:
    """The loss that a command line asks for, on the CPU; `total` as for `PixelLoss`. Raises what
    `class_weights` raises."""
    options = {}
    if args.loss == "ohem":
        options = {"threshold": args.ohem_threshold, "min_kept": args.ohem_min_kept}
    weight = class_weights(args.class_weights, info.classes) if args.class_weights else None
    return build_loss(args.loss, info.ignore_index, weight, total, **options)


def _check(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    if logits.dim() != 4 or target.dim() != 3 or logits.shape[0] != target.shape[0]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(target.shape)} do not fit; give "
            "(N,classes,h,w) logits and (N,H,W) labels"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"labels are {target.dtype}; give class ids as torch.int64")
    classes = logits.shape[1]
    # On CUDA reading the labels back would stall every step; data loading checks them there.
    if target.device.type == "cpu" and target.numel():
        wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"label id {wrong[0].item()} with logits of {classes} classes; ids must be 0 to "
                f"{classes - 1} or {ignore_index} (ignored): does the network's number of "
                "classes match --dataset?"
            )
