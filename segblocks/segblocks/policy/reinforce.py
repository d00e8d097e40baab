"""The learned policy: a small network, trained with REINFORCE (paper section 3.4)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..graphs import TrainingGraphs
from .base import Decision, Policy, block_mean
from .entropy import divergence_from_share, entropy
from .expected import expected_policy_loss
from .network import PolicyNet
from .place import PLACES, at_blocks, mean_by_place
from .recolour import recoloured
from .sampling import sample_count, shift_to_count
from .threshold import fit_threshold

BEFORE_WEIGHT = 0.45  # in standard deviations, to one of gains


class ReinforcePolicy(Policy):
    """Samples blocks while training; takes those with a logit above a threshold when evaluated.

    With `budgets`, training draws exactly so many blocks an image (see `sampling`), the share is
    no part of the reward, and the policy learns to rank: any budget may be asked of it.

    Args:
        sparsity_weight: weight of (target share - realised share) in the reward.
        normalise_advantage: divide the task part of the reward by the standard deviation of the
            task loss over the batch's blocks, so that it does not fade as the loss falls.
        entropy_weight: weight in the reward, against early collapse, of the blocks' mean entropy
            relative to the wanted share: less the divergence from a draw of each block with that
            probability.
        warmup_share: share of the grids at random while `exploration` is above 0; None for
            `percent_target`.
        recolour: in training the policy sees each image in other colours.
        place_weight: once `calibrate` has looked at images, evaluation adds to a block's score so
            many times the mean score of its place (see `place`).

    Attributes:
        threshold: 0-d float buffer; 0, as published, until `calibrate` has set it.
        place: (16, 16) float buffer, what evaluation adds to logits; 0 until then.
        SINCE_PUBLISHED: buffers that published weights lack; 0, they change nothing.
    """

    SINCE_PUBLISHED = ("threshold", "place")

    learns = True
    stochastic = True
    _exploration = 0.0

    def __init__(
        self,
        block_size: int = 128,
        percent_target: float = 0.5,
        quantize_percentage: float = 1 / 16,
        sparsity_weight: float = 1.0,
        budgets: tuple[float, float] | None = None,
        normalise_advantage: bool = False,
        entropy_weight: float = 0.0,
        warmup_share: float | None = None,
        recolour: bool = False,
        place_weight: float = 0.0,
        budget_power: float = 1.0,
    ):
        super().__init__(block_size, percent_target, quantize_percentage, budgets, budget_power)
        if warmup_share is not None and not 0 <= warmup_share <= 1:
            raise ValueError(f"warmup_share is a share between 0 and 1, got {warmup_share}")
        self.sparsity_weight = sparsity_weight
        self.normalise_advantage = normalise_advantage
        self.entropy_weight = entropy_weight
        self.warmup_share = percent_target if warmup_share is None else warmup_share
        self.recolour = recolour
        self.place_weight = place_weight
        self.policy_net = PolicyNet(block_size)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("place", torch.zeros(PLACES))
        # `exploration` on the device: the loss may be part of a CUDA graph, which keeps numbers.
        self.register_buffer("_explored", torch.zeros(()), persistent=False)

    @property
    def exploration(self) -> float:
        return self._exploration

    @exploration.setter
    def exploration(self, value: float) -> None:
        if value != self._exploration:
            self._explored.fill_(value)
        self._exploration = value

    def train_from_graphs(self, graphs: TrainingGraphs | None) -> None:
        self.policy_net.graphs = graphs

    def scores(self, image: Tensor, block_gain: Tensor | None) -> Tensor:
        if self.training:
            change = partial(recoloured, replicas=self.replicas) if self.recolour else None
            return self.policy_net(image, change)
        logits = self.logits(image)
        return logits + at_blocks(self.place, *logits.shape[1:])

    def logits(self, image: Tensor) -> Tensor:
        """(N, Gh, Gw) float of images (N, 3, H, W): what `calibrate` takes."""
        return self.policy_net(image)

    def choose(self, scores: Tensor) -> Tensor:
        if not self.training:
            return scores > self.threshold
        probs = scores.float().sigmoid()
        if self.exploration:
            probs = torch.lerp(probs, torch.full_like(probs, self.warmup_share), self.exploration)
        return self.replicas.uniform(tuple(probs.shape), probs.device) < probs

    def spend(self, scores: Tensor, count: int) -> Decision:
        if not self.training or self.budgets is None:
            return super().spend(scores, count)
        logits = scores.float()
        logits = logits - shift_to_count(logits, count)
        drawn = self.replicas.uniform(tuple(scores.shape), scores.device)
        grid = sample_count((1 - self.exploration) * logits, count, drawn)
        return Decision(grid, grid, scores.shape[0] * count, logits, self.stochastic)

    def draw_share(self) -> float:
        return (1 - self.exploration) * super().draw_share() + self.exploration * self.warmup_share

    @torch.no_grad()
    def calibrate(self, logits: Sequence[Tensor]) -> float:
        """Set `place`, where `place_weight` is not 0, and `threshold` so that evaluation realises
        the target share, rounding up included.

        Args:
            logits: (Gh, Gw) float of each of some images, by `logits` in evaluation mode. Of
                images that it was trained on the policy is surer than of others.

        Returns:
            The share of high blocks that these images then have, their mean.

        Raises:
            ValueError: no images, or logits that are not finite.
        """
        place = self.place.clone()
        if self.place_weight and logits:
            means = [mean_by_place(of_image[None]) for of_image in logits]
            place.copy_(self.place_weight * torch.stack(means).mean(0))
        scores = [of_image + at_blocks(place, *of_image.shape).to(of_image) for of_image in logits]
        threshold, share = fit_threshold(scores, self.percent_target, self.rounded_up)
        self.threshold.fill_(threshold)
        self.place.copy_(place)
        return share

    def loss(self, result, loss_map: Tensor, valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """REINFORCE with the block's task loss as reward (paper equations 5 to 9).

        A high block is rewarded by its mean task loss less the mean over blocks, plus
        sparsity_weight · (target - realised share); a low block by the negative of that. Ignored
        pixels take no part in a block's mean, blocks without valid pixels have no task reward, and
        blocks promoted by rounding earn no gradient. While exploring, grids are not the policy's
        own, and the gradient is that of its own probabilities all the same.
        """
        task, known = block_mean(loss_map.detach().float(), self.block_size, valid)
        task_advantage = self._centred(task, known)
        if self.normalise_advantage:
            task_advantage = task_advantage / self._spread(task_advantage, known)
        share = self.replicas.total(result.share) / self.replicas.count
        sparsity = self._sparsity(share)
        advantage = task_advantage + sparsity
        merit = result.log_probs * torch.where(result.sampled, advantage, -advantage)
        loss = -self._part_of_mean(merit, result.grid == result.sampled)
        logits = result.scores.float()
        stats = self._averages(advantage, task_advantage, logits.detach())
        if self.entropy_weight:
            divergence = divergence_from_share(logits, self._wanted_share(result)).mean()
            loss = loss + self.entropy_weight * divergence / self.replicas.count
        return loss, {"share": share, "sparsity_reward": sparsity, **stats}

    def refining_loss(
        self, result, gain: Tensor, before: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """In place of `loss`, where it was measured what full resolution saves each block (see
        `expected`): the policy learns to rank blocks by that, whatever grid was run.

        Args:
            result: what the model returned in training.
            gain: (N, Gh, Gw) float, what `SegBlocksModel.block_gain` finds: 0 for a block of
                ignored pixels, which are worth nothing.
            before: (N, Gh, Gw) float, logits of the policy before it began to learn from gains. It
                ranks by these, too, `BEFORE_WEIGHT` times as much: of a single block a gain says
                little.

        Returns:
            As `loss`.
        """
        worth = self._standardised(gain)
        if before is not None:
            worth = self._standardised(worth + BEFORE_WEIGHT * self._standardised(before))
        loss = expected_policy_loss(result.scores.float(), worth, self.entropy_weight)
        share = self.replicas.total(result.share) / self.replicas.count
        return loss / self.replicas.count, {"share": share}

    def _wanted_share(self, result) -> Tensor:
        """The target, or the budget of this batch; never none or all of an image's blocks."""
        share = result.sampled.float().mean()
        if self.budgets is None:
            share = torch.full_like(share, self.percent_target)
        least = 0.5 / result.scores[0].numel()
        return share.clamp(least, 1 - least)

    def _averages(
        self, advantage: Tensor, task_advantage: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        """To log, over the blocks of all processes, which hold equally many."""
        probs = logits.sigmoid()
        values = {
            "advantage": advantage.abs(),
            "task_advantage": task_advantage.abs(),
            "prob_mean": probs,
            "prob_square": probs.square(),
        }
        if self.entropy_weight:
            values["entropy"] = entropy(logits)
        means = torch.stack([value.mean() for value in values.values()])
        stats = dict(zip(values, self.replicas.total(means) / self.replicas.count))
        variance = stats.pop("prob_square") - stats["prob_mean"].square()
        return stats | {"prob_std": variance.clamp(min=0).sqrt()}

    def _standardised(self, values: Tensor) -> Tensor:
        """Less their mean, over their standard deviation, over the blocks of all processes."""
        known = torch.ones_like(values, dtype=torch.bool)
        centred = self._centred(values.detach().float(), known)
        return centred / self._spread(centred, known)

    def _spread(self, centred: Tensor, known: Tensor) -> Tensor:
        """Standard deviation of what is centred already."""
        return self._mean(centred.square(), known).sqrt().clamp(min=1e-6)

    def _sparsity(self, share: Tensor) -> Tensor:
        """What the share earns every high block: nothing where the budget is imposed, and nothing
        yet where grids are at random."""
        if self.budgets is not None:
            return torch.zeros_like(share)
        weight = (1 - self._explored) * self.sparsity_weight
        return weight * (self.percent_target - share)

    def _mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """Of the blocks in `mask`, of all processes; 0 where there are none. No gradient."""
        sums = torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)])
        total, blocks = self.replicas.total(sums)
        return total / blocks.clamp(min=1)

    def _part_of_mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """What this process adds to that mean; with gradient."""
        return (values * mask).sum() / self.replicas.total(mask.sum()).clamp(min=1)

    def _centred(self, values: Tensor, known: Tensor) -> Tensor:
        """`values` less their mean over the known blocks; 0 at the others."""
        return torch.where(known, values - self._mean(values, known), 0)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in self.SINCE_PUBLISHED:
            state_dict.setdefault(prefix + name, torch.zeros_like(getattr(self, name)))
        super()._load_from_state_dict(state_dict, prefix, *args)
