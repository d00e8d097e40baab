"""How well a policy places full resolution, beyond the mIoU that comes of it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from dataloaders import DatasetInfo
from segblocks.policy.base import block_mean
from utils.ranks import ALONE, Ranks
from utils.validation.metrics import SegmentationMetrics, count_pixels

TRIMAP_PIXELS = 3  # half the width of the band along label boundaries


@dataclass
class PolicyFigures:
    """Figures of one validation. NaN: nothing to measure.

    Rank correlations (Spearman) are between the policy's scores and the oracle's: what full
    resolution saves in a block's loss, from this network with every block low and every block
    high.
    """

    boundary_miou: float  # on the pixels within TRIMAP_PIXELS of a boundary between two classes
    rank_correlation: float  # mean over images of the correlation over the blocks of each
    rank_correlation_pooled: float  # over the blocks of all images together
    share_per_class: dict[str, float]  # of each class's pixels in full-resolution blocks, 0 to 1
    trimap_pixels: int = TRIMAP_PIXELS

    def scalars(self) -> dict[str, float]:
        """By TensorBoard tag."""
        single = {name: value for name, value in asdict(self).items() if isinstance(value, float)}
        return {f"val_policy/{name}": value for name, value in single.items()} | {
            f"val_share/{name}": value for name, value in self.share_per_class.items()
        }

    def lines(self) -> list[str]:
        """For the log."""
        shares = ", ".join(f"{name} {100 * v:.0f}" for name, v in self.share_per_class.items())
        return [
            f"mIoU within {self.trimap_pixels} pixels of a label boundary: "
            f"{100 * self.boundary_miou:.2f} %",
            f"rank correlation with the oracle: {self.rank_correlation:.3f} within an image, "
            f"{self.rank_correlation_pooled:.3f} over all blocks",
            f"full resolution by class, % of its pixels: {shares}",
        ]


class PolicyMetrics:
    """Gathers `PolicyFigures` over a validation of one image at a time."""

    def __init__(self, info: DatasetInfo, block_size: int, device: torch.device | str = "cpu"):
        self.info, self.block_size = info, block_size
        # There from the start: a rank without images joins in the exchange at the end.
        self.boundary = SegmentationMetrics(info.num_classes).to(device)
        self.pixels: Tensor | int = 0  # (2, classes): of low and of high blocks
        self.ranked: dict[int, tuple[Tensor, Tensor]] = {}  # by image: scores and gains, (K,) each

    def update(
        self, index: int, prediction: Tensor, label: Tensor, result: Any, gain: Tensor | None
    ) -> None:
        """Add image number `index`.

        `prediction` and `label` (1,H,W) int64, `result` the model's, `gain` (1,Gh,Gw) float, None
        for a dense network, which ranks nothing.
        """
        ignore = self.info.ignore_index
        band = near_boundary(label, ignore, TRIMAP_PIXELS)
        in_band = label.masked_fill(~band, ignore)
        self.boundary.update(count_pixels(prediction, in_band, self.info.num_classes, ignore))
        self.pixels = self.pixels + self._pixels(label, result.grid)
        if gain is not None and result.scores is not None:
            valid = label != ignore
            known = block_mean(valid.float(), self.block_size, valid)[1]
            pair = result.scores[known].float().cpu(), gain[known].float().cpu()
            self.ranked[index] = pair

    def _pixels(self, label: Tensor, grid: Tensor) -> Tensor:
        """(2, classes) int64: pixels of each class in low and in high blocks."""
        high = grid.repeat_interleave(self.block_size, 1).repeat_interleave(self.block_size, 2)
        high = high[:, : label.shape[1], : label.shape[2]].long()
        valid = label != self.info.ignore_index
        cell = (high * self.info.num_classes + label)[valid]
        return cell.bincount(minlength=2 * self.info.num_classes).view(2, -1)

    def compute(self, ranks: Ranks = ALONE) -> PolicyFigures:
        """Of the images of all ranks."""
        parts = ranks.everyones((torch.as_tensor(self.pixels).cpu(), self.ranked))
        low, high = sum(pixels for pixels, _ in parts).double().expand(2, self.info.num_classes)
        together = {index: pair for _, ranked in parts for index, pair in ranked.items()}
        pairs = [together[index] for index in sorted(together)]
        within = torch.tensor([rank_correlation(*p) for p in pairs], dtype=torch.float64).nanmean()
        scores, gains = (torch.cat([p[i] for p in pairs] + [torch.zeros(0)]) for i in (0, 1))
        return PolicyFigures(
            boundary_miou=self.boundary.compute()["miou"],
            rank_correlation=float(within),
            rank_correlation_pooled=rank_correlation(scores, gains),
            share_per_class=dict(zip(self.info.classes, (high / (low + high)).tolist())),
        )


def rank_correlation(scores: Tensor, gains: Tensor) -> float:
    """Spearman's, of (K,) float each; NaN where one of the two is the same everywhere."""
    if len(scores) < 2 or (scores == scores[0]).all() or (gains == gains[0]).all():
        return float("nan")
    return float(spearman_corrcoef(scores, gains))


def near_boundary(label: Tensor, ignore_index: int, pixels: int) -> Tensor:
    """The trimap: pixels at most `pixels` away, in either direction of the picture, from a pixel
    whose right, left, upper or lower neighbour has another class. Void is no class.

    `label` (N,H,W) int64 -> bool (N,H,W).
    """
    edge = torch.zeros(label.shape, dtype=torch.bool, device=label.device)
    for axis in (1, 2):
        length = label.shape[axis] - 1
        first, second = label.narrow(axis, 0, length), label.narrow(axis, 1, length)
        differs = (first != second) & (first != ignore_index) & (second != ignore_index)
        edge.narrow(axis, 0, length).logical_or_(differs)
        edge.narrow(axis, 1, length).logical_or_(differs)
    if not pixels:
        return edge
    return F.max_pool2d(edge[:, None].float(), 2 * pixels + 1, 1, pixels)[:, 0] > 0
