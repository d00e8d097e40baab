"""What a policy may expect of its grids, where it was measured what full resolution gives a block.

REINFORCE hears of a block what came of the one resolution that was drawn for it. Where the loss at
both is known, the expectation that it estimates (paper equation 5) can be computed, and that for
many budgets at once.
"""

import torch
from torch import Tensor

from .entropy import divergence_from_share
from .sampling import shift_to_count

BUDGETS = 8  # evenly spaced shares, from 1/16 to 15/16


def expected_policy_loss(logits: Tensor, gain: Tensor, entropy_weight: float = 0.0) -> Tensor:
    """What is expected to be lost, mean over blocks and budgets.

    For each budget the logits of an image are shifted so that its blocks are high with
    probabilities that add up to it. A high block then earns its gain and a low one the negative of
    that; with `entropy_weight`, probabilities far from the budget's share cost their divergence
    from it, too. Only differences between the logits of an image count, for the gradient as well:
    the shift moves with them.

    Args:
        logits: (N, Gh, Gw) float32.
        gain: (N, Gh, Gw) float32, in standard deviations from its mean; no gradient.

    Returns:
        A scalar.
    """
    n, blocks = len(logits), logits[0].numel()
    counts = (torch.arange(BUDGETS, device=logits.device) + 0.5) * (blocks / BUDGETS)
    counts = counts.clamp(min(0.5, blocks / 2), max(blocks - 0.5, blocks / 2))
    every = logits.expand(BUDGETS, *logits.shape)  # S,N,Gh,Gw
    with torch.no_grad():
        shift = shift_to_count(every.flatten(0, 1), counts.repeat_interleave(n))
        shift = shift.unflatten(0, (BUDGETS, n))
        slope = (every - shift).sigmoid()
        slope = slope * (1 - slope)
        slope = slope / slope.sum((2, 3), keepdim=True)
    moved = (slope * (logits - logits.detach())).sum((2, 3), keepdim=True)
    shifted = every - (shift + moved)
    loss = -((2 * shifted.sigmoid() - 1) * gain).mean()
    if entropy_weight:
        shares = (counts / blocks)[:, None, None, None]
        loss = loss + entropy_weight * divergence_from_share(shifted, shares).mean()
    return loss
