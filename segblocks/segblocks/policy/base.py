"""What every policy shares: scores become a grid, by threshold or by budget."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graphs import TrainingGraphs
from ..ops import select_budget
from ..replicas import Replicas


@dataclass(frozen=True)
class Decision:
    """Where to spend full resolution; travels with the forward pass.

    Attributes:
        grid: (N, Gh, Gw) bool, True = high resolution: what runs.
        sampled: (N, Gh, Gw) bool, the policy's own choice before rounding up; blocks in `grid` but
            not in `sampled` were promoted.
        n_high: number of high blocks; None where the host has not asked the device for it yet.
        scores: (N, Gh, Gw) float, by which blocks are ranked; None for `disabled`.
        stochastic: the scores are logits of each block's probability of high resolution.
    """

    grid: Tensor
    sampled: Tensor
    n_high: int | None = None
    scores: Tensor | None = None
    stochastic: bool = False

    @property
    def probs(self) -> Tensor | None:
        """(N, Gh, Gw) float32 probability of high resolution; None if not stochastic."""
        return self.scores.float().sigmoid() if self.stochastic else None

    @property
    def log_probs(self) -> Tensor | None:
        """(N, Gh, Gw) float32 log-probability of each block's action; None if not stochastic."""
        if not self.stochastic:
            return None
        logits = self.scores.float()
        return F.logsigmoid(torch.where(self.sampled, logits, -logits))


BUDGET_STEPS = 5  # from the lowest budget in training to the highest


class Policy(nn.Module):
    """Base of all policies.

    Args:
        block_size: side of a high block in image pixels.
        percent_target: wanted share of high blocks, 0 to 1.
        quantize_percentage: without a budget, the number of high blocks in a batch is rounded up to
            a multiple of this share of all blocks, so that few distinct shapes occur; 0 for none.
        budgets: lowest and highest share; every batch in training then gets a budget of its own,
            one of six shares from one of the two to the other, the same for all its images. None:
            the policy decides.
        budget_power: how much more often a budget near the lowest is drawn: it is as far from it
            as a uniform number to this power, rounded to a fifth of the way. 1: all alike, but the
            two ends half as often.

    Attributes:
        exploration: 1 for grids at random, 0 for the policy's own; what lies between mixes. The
            training loop sets it, and only training looks at it.
        replicas: set it where several processes train together: draws and the loss are then those
            of the whole batch. Rounding up stays each process's own, for its own shapes.
    """

    learns = False
    stochastic = False
    needs_pixel_loss = False
    exploration = 0.0

    def __init__(
        self,
        block_size: int = 128,
        percent_target: float = 0.5,
        quantize_percentage: float = 1 / 16,
        budgets: tuple[float, float] | None = None,
        budget_power: float = 1.0,
    ):
        super().__init__()
        if not isinstance(block_size, int) or block_size < 2 or block_size % 2:
            raise ValueError(f"block_size must be an even number of pixels, got {block_size}")
        for name, value in (
            ("percent_target", percent_target),
            ("quantize_percentage", quantize_percentage),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {value}")
        if budgets is not None and not (len(budgets) == 2 and 0 <= budgets[0] <= budgets[1] <= 1):
            raise ValueError(
                f"budgets is {budgets}; give (lowest, highest), shares with 0 <= lowest <= highest "
                "<= 1"
            )
        if not budget_power > 0:
            raise ValueError(f"budget_power must be above 0, got {budget_power}")
        self.budgets = None if budgets is None else tuple(budgets)
        self.budget_power = budget_power
        self.replicas = Replicas()
        self.block_size = block_size
        self.percent_target = percent_target
        self.quantize_percentage = quantize_percentage

    def train_from_graphs(self, graphs: TrainingGraphs | None) -> None:
        """Let what the policy learns run from CUDA graphs; None: as written."""

    def grid_shape(self, image: Tensor) -> tuple[int, int, int]:
        """(N, Gh, Gw) of an image whose sides the block size divides.

        Raises:
            ValueError: it does not.
        """
        n, _, height, width = image.shape
        if height % self.block_size or width % self.block_size or not image.numel():
            raise ValueError(
                f"image of {height}×{width} pixels is not made of blocks of {self.block_size}; "
                "pad it (SegBlocksModel does) or choose a block_size that divides both"
            )
        return n, height // self.block_size, width // self.block_size

    def forward(
        self,
        image: Tensor,
        budget: float | int | None = None,
        block_gain: Tensor | None = None,
        settled: bool = True,
    ) -> Decision:
        """Decide for each block.

        Args:
            image: (N, 3, H, W) float, H and W multiples of the block size.
            budget: share of blocks (float, 0 to 1) or count of blocks per image (int). Exactly
                that many blocks of each image, those with the highest scores, run high, and
                nothing is read back to the host.
            block_gain: (N, Gh, Gw) float, the oracle's knowledge; other policies ignore it.
            settled: False puts off what needs the number of blocks that the policy has chosen, so
                that nothing is read from the device: `n_high` is then None and `grid` is `sampled`
                until `settle` or `promote`.
        """
        shape = self.grid_shape(image)
        scores = self.scores(image, block_gain)
        if budget is None:
            budget = self.own_budget(*shape[1:])
        if budget is not None:
            return self.spend(scores, budget_count(budget, shape[1] * shape[2]))
        sampled = self.choose(scores)
        decision = Decision(sampled, sampled, None, scores, self.stochastic)
        return self.settle(decision) if settled else decision

    def own_budget(self, rows: int, columns: int) -> float | int | None:
        """The budget of a batch for which none is given: with `budgets`, drawn in training. None:
        the policy chooses how many blocks."""
        if self.training and self.budgets is not None:
            return self.draw_budget(rows * columns)
        return self.default_budget(rows, columns)

    def draw_budget(self, blocks: int) -> int:
        """Blocks per image for one training batch.

        Drawn on the host, so that nothing is read back, and a multiple of the quantisation step, so
        that few distinct shapes occur; but within `budgets`, if any count is.
        """
        share = self.draw_share()
        step = max(1, round(blocks * self.quantize_percentage))
        # A warm-up may draw shares beyond the two.
        least = math.ceil(min(share, self.budgets[0]) * blocks)
        most = math.floor(max(share, self.budgets[1]) * blocks)
        if least > most:
            return round(share * blocks)
        return min(max(round(share * blocks / step) * step, least), most)

    def draw_share(self) -> float:
        """One of the six shares from one of `budgets` to the other, from torch's CPU generator.
        They are few because each has tensor shapes, and so CUDA graphs, of its own."""
        low, high = self.budgets
        if low == high:
            return low
        step = round(BUDGET_STEPS * torch.rand(()).item() ** self.budget_power)
        return low + (high - low) * step / BUDGET_STEPS

    def default_budget(self, rows: int, columns: int) -> float | int | None:
        """The budget when none is given; None leaves the choice to `choose`."""
        return None

    def scores(self, image: Tensor, block_gain: Tensor | None) -> Tensor:
        """(N, Gh, Gw) float: the higher, the more a block deserves full resolution."""
        raise NotImplementedError

    def choose(self, scores: Tensor) -> Tensor:
        """(N, Gh, Gw) bool from scores, without a budget."""
        raise NotImplementedError

    def spend(self, scores: Tensor, count: int) -> Decision:
        """Exactly `count` blocks an image, by score."""
        grid = select_budget(scores.detach().float(), count)
        return Decision(grid, grid, scores.shape[0] * count, scores, self.stochastic)

    def settle(self, decision: Decision, count: int | None = None) -> Decision:
        """Round the number of high blocks up, as `quantize_percentage` says.

        `count`: how many are sampled; None: that is read from the device, as it sets the shapes.
        """
        if count is None:
            count = int(decision.sampled.sum())
        wanted = self.rounded_up(count, decision.sampled.numel())
        if wanted == count:
            return replace(decision, n_high=count)
        return self.promote(decision, wanted)

    def promote(self, decision: Decision, n_high: int) -> Decision:
        """Make it `n_high` high blocks in the batch, at least as many as are sampled: of the
        others, those with the highest scores."""
        # Chosen blocks come first whatever their score, then the others by score.
        scores = decision.scores.detach().float()
        rank = torch.where(decision.sampled, torch.inf, scores).flatten()
        grid = select_budget(rank[None, None], n_high).view(decision.sampled.shape)
        return replace(decision, grid=grid, n_high=n_high)

    def rounded_up(self, count: int, total: int) -> int:
        """`count` high blocks of `total`, rounded up to a multiple of the quantisation step."""
        step = max(1, round(total * self.quantize_percentage))
        return min(total, math.ceil(count / step) * step)

    def loss(self, result, loss_map: Tensor, valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's own training loss; zero for policies that do not learn.

        Args:
            result: what the model returned (see `SegBlocksModel.forward`).
            loss_map: (N, H, W) float, task loss of each pixel.
            valid: (N, H, W) bool, False at ignored pixels.

        Returns:
            A scalar tensor and named scalars to log. Of several processes, each returns its part
            of the loss, to be added up, and the same scalars, those of the whole batch.
        """
        share = self.replicas.total(result.share) / self.replicas.count
        return loss_map.new_zeros(()), {"share": share}


class BudgetError(ValueError):
    """A budget that no image can have, or not this one."""


def budget_count(budget: float | int, blocks: int) -> int:
    """Blocks per image that a budget stands for.

    Raises:
        BudgetError: a share outside 0 to 1, or a count outside 0 to `blocks`.
        TypeError: neither a float nor an int.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(
            f"budget is a share (float) or a count of blocks an image (int), got {budget!r}"
        )
    if isinstance(budget, int):
        if not 0 <= budget <= blocks:
            raise BudgetError(
                f"budget of {budget} blocks: an image has {blocks}; give 0 to {blocks}, or a share "
                "as a float (0.4 for 40 %)"
            )
        return budget
    if not 0 <= budget <= 1:
        raise BudgetError(f"budget as a share must lie between 0 and 1, got {budget}")
    return round(budget * blocks)


def block_mean(values: Tensor, block: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean over each block of the valid pixels.

    Args:
        values: (N, H, W) float; sides that `block` does not divide are padded with invalid pixels.
        block: side in pixels.
        valid: (N, H, W) bool or None for all.

    Returns:
        mean (N, Gh, Gw), 0 where a block has no valid pixel; known (N, Gh, Gw) bool.
    """
    weight = torch.ones_like(values) if valid is None else valid.to(values.dtype)
    n, height, width = values.shape
    pad = (0, -width % block, 0, -height % block)
    values = values if valid is None else values.masked_fill(~valid, 0)
    total = F.pad(values, pad)
    count = F.pad(weight, pad)

    def blocks(x: Tensor) -> Tensor:
        x = x.view(n, x.shape[1] // block, block, x.shape[2] // block, block)
        return x.sum(dim=(2, 4))

    total, count = blocks(total), blocks(count)
    return total / count.clamp(min=1), count > 0
