"""Scores of a segmentation, from a confusion matrix gathered on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class SegmentationMetrics(Metric):
    """Accuracies and intersection over union, accumulated over a whole data set.

    torchmetrics' own confusion matrix waits for the device in every update to drop the ignored
    pixels, and in deterministic mode needs memory for classes² values per pixel; this one does
    neither.

    A class without a single labelled pixel in everything seen cannot be scored: its IoU is NaN
    and it is left out of the means. Pixels wrongly predicted as that class still count as errors
    of the classes they belong to. Without any labelled pixel every score is NaN.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, num_classes: int):
        # The result depends on the names given to compute, so it is not cached.
        super().__init__(compute_with_cache=False)
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; scores need at least one class")
        self.num_classes = num_classes
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("confusion", default=confusion, dist_reduce_fx="sum")  # label,prediction

    def update(self, counts: Tensor) -> None:
        """Add what `count_pixels` has counted."""
        self.confusion += counts

    def compute(self, classes: Sequence[str] | None = None) -> dict[str, float | dict[str, float]]:
        """Scores from 0 to 1; `classes` names the classes (default "0", "1", …).

        Keys: overall_accuracy, mean_accuracy (mean over classes of the recall),
        weighted_accuracy (IoU of each class weighted by its share of the labelled pixels),
        miou, and iou, a dict from class name to IoU. Raises ValueError for a wrong number of names.
        """
        names = [str(i) for i in range(self.num_classes)] if classes is None else list(classes)
        if len(names) != self.num_classes:
            raise ValueError(f"{len(names)} class names for {self.num_classes} classes")
        confusion = self.confusion.cpu().double()
        correct, labelled = confusion.diagonal(), confusion.sum(dim=1)
        union = labelled + confusion.sum(dim=0) - correct
        recall = correct / labelled  # 0 / 0 is NaN, exactly for the classes without a label
        iou = torch.where(labelled > 0, correct / union, torch.nan)
        return {
            "overall_accuracy": (correct.sum() / labelled.sum()).item(),
            "mean_accuracy": recall.nanmean().item(),
            "weighted_accuracy": ((labelled * iou).nansum() / labelled.sum()).item(),
            "miou": iou.nanmean().item(),
            "iou": dict(zip(names, iou.tolist())),
        }


def count_pixels(prediction: Tensor, target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """The confusion matrix of a batch, (classes, classes) int64: labels × predictions.

    Args:
        prediction: (N,H,W) int64, class ids.
        target: (N,H,W) int64, class ids or `ignore_index`, which data loading has made sure of.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"predictions {tuple(prediction.shape)} and labels {tuple(target.shape)} differ in "
            "shape; resize the logits to the size of the labels first"
        )
    cell = target * classes + prediction
    # One spare cell takes the ignored pixels, so that no shape depends on the data.
    cell = cell.masked_fill(target == ignore_index, classes**2).flatten()
    counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=cell.device)
    counts.scatter_add_(0, cell, torch.ones_like(cell))
    return counts[:-1].view(classes, classes)
