"""What a pixel earns the policy: its loss, or its loss over the size of its class."""

from argparse import Namespace

import torch
from torch import Tensor, nn

from dataloaders import DatasetInfo
from utils.losses import Total, mean_of_one, own_count, pixel_weights

_SAMPLED = 4  # of so many lines and columns one is enough to tell how large classes are
_SMALLEST = 1e-3  # of all pixels; a smaller class counts as if it were so large


class LossReward(nn.Module):
    """The map of the task loss, as published."""

    def forward(self, loss_map: Tensor, label: Tensor) -> Tensor:
        """(N,H,W) from a loss map (N,H,W), 0 at ignored pixels, and label (N,H,W) int64."""
        return loss_map


class BalancedReward(nn.Module):
    """The map of the task loss over the size of the pixel's class: classes count alike, as they do
    in mean IoU, so a pixel of a pole earns what dozens of road do.

    The mean weight of the batch's valid pixels is 1. `total` adds a tensor up over the processes
    that share the batch.

    Attributes:
        seen: (classes,) int64 buffer, pixels of each class in all batches so far, of a sample.
    """

    seen: Tensor

    def __init__(self, classes: int, ignore_index: int = 255, total: Total = own_count):
        super().__init__()
        self.ignore_index = ignore_index
        self.total = total
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def forward(self, loss_map: Tensor, label: Tensor) -> Tensor:
        """As that of LossReward."""
        classes = torch.arange(len(self.seen), device=label.device)
        sample = label[:, ::_SAMPLED, ::_SAMPLED].reshape(-1, 1)
        self.seen += self.total((sample == classes).sum(0))
        size = self.seen.to(loss_map.dtype) / self.seen.sum().clamp(min=1)
        valid = label != self.ignore_index
        weights = pixel_weights(1 / size.clamp(min=_SMALLEST), label, valid)
        return loss_map * weights * mean_of_one(weights, valid, self.total)


def build_reward(args: Namespace, info: DatasetInfo, total: Total = own_count) -> nn.Module:
    """As --segblocks-reward says."""
    if args.segblocks_reward == "loss":
        return LossReward()
    return BalancedReward(info.num_classes, info.ignore_index, total)
