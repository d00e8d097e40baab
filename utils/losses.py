"""Segmentation losses: a scalar to train on and a per-pixel map that policies learn from.

Every loss is called as `loss(logits, target) -> (scalar, loss_map)`. Where several processes share
a batch, the scalars of all of them add up to the loss of the whole batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Total = Callable[[Tensor], Tensor]


def _own(count: Tensor) -> Tensor:
    return count


def pixel_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of every pixel.

    logits (N,classes,h,w), floating, are resized bilinearly (corners not aligned) to the size of
    target (N,H,W), int64. Returns (N,H,W), float32 (float64 for float64 logits), 0 at ignored
    pixels. Half-precision logits are widened first. Raises ValueError if shapes or dtypes do not
    fit; label ids are checked on the CPU only, because on CUDA that would wait for the device.
    """
    _check(logits, target, ignore_index)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[-2:] != target.shape[-2:]:
        logits = F.interpolate(
            logits, size=target.shape[-2:], mode="bilinear", align_corners=False
        )  # N,classes,H,W
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")


class CrossEntropy(nn.Module):
    """Cross-entropy, averaged over the valid pixels of the batch.

    (logits (N,classes,h,w), target (N,H,W) int64) -> (loss (), loss_map (N,H,W)). The map is
    0 at ignored pixels and carries no gradient. A batch without a valid pixel has loss 0.
    `total` adds a count up over the processes that share the batch.
    """

    def __init__(self, ignore_index: int = 255, total: Total = _own):
        super().__init__()
        self.ignore_index = ignore_index
        self.total = total

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss_map = pixel_cross_entropy(logits, target, self.ignore_index)
        valid = self.total((target != self.ignore_index).sum())
        return loss_map.sum() / valid.clamp(min=1), loss_map.detach()


class BootstrappedCrossEntropy(nn.Module):
    """Cross-entropy over the hardest pixels of each image, averaged over the images.

    Of each image: the pixels whose loss exceeds `threshold` if the k-th largest loss does, else
    the `k` pixels with the largest loss; all valid pixels where there are fewer than k. Images
    without a valid pixel take no part in the average; a batch without one has loss 0.
    Shapes as for `CrossEntropy`. (After Wu et al., "Bridging Category-level and Instance-level
    Semantic Image Segmentation", 2016, section 2.2.)
    """

    def __init__(
        self,
        k: int = 4096,
        threshold: float = 0.3,
        ignore_index: int = 255,
        total: Total = _own,
    ):
        super().__init__()
        if k < 1:
            raise ValueError(f"k is {k}; the bootstrapped loss needs at least one pixel per image")
        if threshold < 0:
            raise ValueError(f"threshold is {threshold}; a cross-entropy is never below 0")
        self.k = k
        self.threshold = threshold
        self.ignore_index = ignore_index
        self.total = total

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        loss_map = pixel_cross_entropy(logits, target, self.ignore_index)
        losses = loss_map.flatten(1)  # N,H*W
        valid = (target != self.ignore_index).flatten(1)
        # Ignored pixels sort last; everything stays on the device, without a data-dependent shape.
        ranked = losses.masked_fill(~valid, -1.0)
        hardest = ranked.topk(min(self.k, ranked.shape[1]), dim=1).values  # N,k
        by_threshold = _masked_mean(losses, valid & (losses > self.threshold))
        by_rank = _masked_mean(hardest, hardest >= 0)
        enough = hardest[:, -1] > self.threshold
        per_image = torch.where(enough, by_threshold, by_rank)  # N
        images = self.total(valid.any(dim=1).sum())
        return per_image.sum() / images.clamp(min=1), loss_map.detach()


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (N,M) over dim 1 where mask (N,M) holds; 0 where it never does."""
    return values.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


LOSSES = {"crossentropy": CrossEntropy, "bootstrap_ce": BootstrappedCrossEntropy}


def build_loss(name: str, ignore_index: int = 255, total: Total = _own) -> nn.Module:
    """The loss called `name`; raises ValueError for an unknown name."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(LOSSES)}")
    return LOSSES[name](ignore_index=ignore_index, total=total)


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
