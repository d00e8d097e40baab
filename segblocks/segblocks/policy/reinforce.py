"""The learned policy: a small network, trained with REINFORCE (paper section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Policy, block_mean

NET_STRIDE = 32


class PolicyNet(nn.Module):
    """Image (N, 3, H, W) → one logit a block (N, Gh, Gw), at 32 input pixels a block side."""

    def __init__(self, block_size: int):
        super().__init__()
        self.block_size = block_size

        def norm() -> nn.BatchNorm2d:
            return nn.BatchNorm2d(64, momentum=0.02)

        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=4, padding=3, bias=False),
            norm(),
            nn.ReLU(),
            nn.Conv2d(64, 64, 5, stride=2, padding=2, bias=False),
            norm(),
            nn.ReLU(),
            nn.Conv2d(64, 64, 5, stride=2, padding=2, bias=False),
            norm(),
            nn.ReLU(),
            nn.Conv2d(64, 1, 5, stride=2, padding=2),
        )

    def forward(self, image: Tensor) -> Tensor:
        step, rest = divmod(self.block_size, NET_STRIDE)
        if rest == 0:
            small = image[:, :, ::step, ::step]  # what "nearest" picks, without reading the rest
        else:
            sides = [length // self.block_size * NET_STRIDE for length in image.shape[2:]]
            small = F.interpolate(image, size=sides, mode="nearest")
        return self.layers(small)[:, 0]


class ReinforcePolicy(Policy):
    """Samples blocks while training; takes those with a positive logit when evaluated.

    Args:
        sparsity_weight: weight of (target share - realised share) in the reward.
    """

    learns = True
    stochastic = True

    def __init__(
        self,
        block_size: int = 128,
        percent_target: float = 0.5,
        quantize_percentage: float = 1 / 16,
        sparsity_weight: float = 1.0,
    ):
        super().__init__(block_size, percent_target, quantize_percentage)
        self.sparsity_weight = sparsity_weight
        self.policy_net = PolicyNet(block_size)

    def scores(self, image: Tensor, block_gain: Tensor | None) -> Tensor:
        return self.policy_net(image)

    def choose(self, scores: Tensor) -> Tensor:
        if self.training:
            drawn = self.replicas.uniform(tuple(scores.shape), scores.device)
            return drawn < scores.float().sigmoid()
        return scores > 0

    def loss(self, result, loss_map: Tensor, valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """REINFORCE with the block's task loss as reward (paper equations 5 to 9).

        A high block is rewarded by its mean task loss less the mean over blocks, plus
        sparsity_weight · (target - realised share); a low block by the negative of that. Ignored
        pixels take no part in a block's mean, blocks without valid pixels have no task reward, and
        blocks promoted by rounding earn no gradient.
        """
        task, known = block_mean(loss_map.detach().float(), self.block_size, valid)
        own = result.grid == result.sampled
        total, count = self.replicas.total, self.replicas.count
        sums = [(task * known).sum(), known.sum(), own.sum(), result.share]
        task_sum, known_blocks, own_blocks, share = total(torch.stack(sums))
        share = share / count
        task_advantage = torch.where(known, task - task_sum / known_blocks.clamp(min=1), 0)
        sparsity = self.sparsity_weight * (self.percent_target - share)
        advantage = task_advantage + sparsity
        reward = torch.where(result.sampled, advantage, -advantage)
        loss = -(result.log_probs * reward * own).sum() / own_blocks.clamp(min=1)
        probs = result.probs.detach()
        means = [advantage.abs().mean(), task_advantage.abs().mean(), probs.mean()]
        advantage_mean, task_mean, prob_mean = total(torch.stack(means)) / count
        return loss, {
            "share": share,
            "sparsity_reward": sparsity,
            "advantage": advantage_mean,
            "task_advantage": task_mean,
            "prob_mean": prob_mean,
            "prob_std": (total((probs - prob_mean).square().mean()) / count).sqrt(),
        }
