"""Policies that rank blocks without learning: random, middle, heuristic, oracle, and disabled."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..replicas import Replicas
from .base import Decision, Policy, block_mean, budget_count


class DisabledPolicy(Policy):
    """The dense network: every block at full resolution."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        if self.budgets is not None:
            raise ValueError("the 'disabled' policy has no budgets: it runs the dense network")

    def forward(self, image, budget=None, block_gain=None) -> Decision:
        if budget is not None:
            raise ValueError("the 'disabled' policy has no budget: it runs the dense network")
        n, height, width = image.shape[0], *image.shape[2:]
        shape = (n, -(-height // self.block_size), -(-width // self.block_size))
        grid = torch.ones(shape, dtype=torch.bool, device=image.device)
        return Decision(grid, grid, grid.numel())


class _SharePolicy(Policy):
    """Its target share is its budget when none is given, so nothing needs rounding up."""

    def default_budget(self, rows: int, columns: int) -> float | int | None:
        return float(self.percent_target)


class RandomPolicy(_SharePolicy):
    """A random share of blocks; what a learned policy has to beat."""

    def scores(self, image: Tensor, block_gain: Tensor | None) -> Tensor:
        # In evaluation processes need not hold equally many images, and each draws its own.
        replicas = self.replicas if self.training else Replicas()
        return replicas.uniform(self.grid_shape(image), image.device)


class MiddlePolicy(_SharePolicy):
    """Full rows of blocks round the middle of the image, where a street scene has its detail."""

    def default_budget(self, rows: int, columns: int) -> float | int | None:
        return budget_count(float(self.percent_target), rows) * columns  # whole rows

    def scores(self, image: Tensor, block_gain: Tensor | None) -> Tensor:
        n, gh, gw = self.grid_shape(image)
        rows = -(torch.arange(gh, device=image.device) - (gh - 1) / 2).abs()
        return rows[None, :, None].expand(n, gh, gw).contiguous()


class _ThresholdPolicy(Policy):
    """Compares each block's score with the target, as the published release did."""

    def choose(self, scores: Tensor) -> Tensor:
        return scores > self.percent_target


class HeuristicPolicy(_ThresholdPolicy):
    """Blocks in which the image loses most by being averaged 4×4 (published `heuristic`).

    The score is the block mean of |upsample(avgpool4(x)) - x| summed over channels.
    """

    def scores(self, image: Tensor, block_gain: Tensor | None) -> Tensor:
        self.grid_shape(image)
        coarse = F.avg_pool2d(image, 4)
        coarse = F.interpolate(coarse, size=image.shape[2:], mode="nearest")
        return block_mean((coarse - image).abs().sum(1), self.block_size)[0]


class OraclePolicy(_ThresholdPolicy):
    """Blocks whose task loss drops most from low to high resolution; needs the labels.

    The score is the block mean of low-resolution loss minus high-resolution loss.
    """

    needs_pixel_loss = True

    def scores(self, image: Tensor, block_gain: Tensor | None) -> Tensor:
        if block_gain is None:
            raise ValueError(
                "the 'oracle' policy needs the labels: call model(image, pixel_loss=function), "
                "where function(logits) is the loss of each pixel (N, H, W)"
            )
        return block_gain
