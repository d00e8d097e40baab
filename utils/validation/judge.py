"""What validation counts of a pass on one image, where the pass happens: on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloaders import DatasetInfo
from segblocks import SegBlocksOutput
from utils.validation.metrics import count_pixels
from utils.validation.predict import predict


@dataclass(frozen=True)
class Judged:
    """A pass on one image.

    Attributes:
        prediction: (1,H,W) int64, class ids at the size of the label.
        confusion: (classes, classes) int64, see `count_pixels`.
        blocks: (4,) int64, see `BlockShares`.
        grid: (1,Gh,Gw) bool, as the model returns it.
        scores: (1,Gh,Gw) float, as well; None for a dense network.
        n_high: number of full-resolution blocks.
    """

    prediction: Tensor
    confusion: Tensor
    blocks: Tensor
    grid: Tensor
    scores: Tensor | None
    n_high: int


class Judge:
    """Judges outputs of a model. Where it runs from CUDA graphs, that is part of them."""

    def __init__(self, info: DatasetInfo, block_size: int, device: torch.device):
        self.classes, self.ignore_index = info.num_classes, info.ignore_index
        self.block_size = block_size
        # Made once: copied from the host for each image, it would wait for the device each time.
        self.small = torch.tensor(list(info.small_ids), dtype=torch.int64, device=device)

    def __call__(self, run: Callable[..., Any], label: Tensor, at_image: Tensor) -> Judged:
        """Run the model on an image and judge what it returns.

        Args:
            run: a function of what `SegBlocksModel.forward` takes beyond the image.
            label: (1,H,W) int64.
            at_image: the same at the size of the image.
        """
        return Judged(**run(objective=self._judge, targets=(label, at_image)))

    def _judge(self, result: SegBlocksOutput, label: Tensor, at_image: Tensor) -> dict[str, Any]:
        prediction = predict(result.logits, label.shape[-2:])
        return {
            "prediction": prediction,
            "confusion": count_pixels(prediction, label, self.classes, self.ignore_index),
            "blocks": count_blocks(result.grid, at_image, self.small, self.block_size),
            "grid": result.grid,
            "scores": result.scores,
            "n_high": result.n_high,
        }


class BlockShares:
    """Share of full-resolution blocks, over all blocks and with and without small classes."""

    NAMES = ("small_blocks", "small_high", "plain_blocks", "plain_high")

    def __init__(self) -> None:
        self.counts: Tensor | int = 0

    def update(self, counts: Tensor) -> None:
        """See `count_blocks`."""
        self.counts = self.counts + counts

    def counts_on_host(self) -> dict[str, int]:
        return {} if isinstance(self.counts, int) else dict(zip(self.NAMES, self.counts.tolist()))


def count_blocks(grid: Tensor, label: Tensor, classes: Tensor, block_size: int) -> Tensor:
    """(4,) int64, as BlockShares names them: blocks that show any of `classes`, those of them that
    are high, and both of all others. Grid (N,Gh,Gw) bool, label as for `blocks_with`."""
    small = blocks_with(label, classes, block_size)
    parts = (small, small & grid, ~small, ~small & grid)
    return torch.stack(parts).flatten(1).sum(1)


def block_shares(parts: list[dict[str, int]]) -> dict[str, float]:
    """Shares from the counts of every rank."""
    small, small_high, plain, plain_high = (
        sum(part.get(name, 0) for part in parts) for name in BlockShares.NAMES
    )
    return {
        "share": (small_high + plain_high) / (small + plain),
        "share_small": _ratio(small_high, small),
        "share_plain": _ratio(plain_high, plain),
    }


def blocks_with(label: torch.Tensor, classes: torch.Tensor, block_size: int) -> torch.Tensor:
    """Which blocks show any of `classes`: label and ids (n,), int64 -> bool (N,Gh,Gw)."""
    wanted = torch.isin(label, classes)
    height, width = label.shape[-2:]
    wanted = F.pad(wanted.float(), (0, -width % block_size, 0, -height % block_size))
    return F.max_pool2d(wanted[:, None], block_size)[:, 0] > 0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
