"""Learning to rank blocks by what full resolution was measured to save each of them.

REINFORCE hears of a block what came of the one resolution that was drawn for it. Where the loss at
both is known, the expectation that it estimates (paper equation 5) can be computed, and that for
many budgets at once.
"""

import torch
from torch import Tensor

from .entropy import divergence_from_share
from .sampling import shift_to_count

BUDGETS = 8  # evenly spaced shares, from 1/16 to 15/16


def ranking_loss(logits: Tensor, saving: Tensor, entropy_weight: float = 0.0) -> Tensor:
    """What is expected to be lost, mean over blocks and budgets.

    For each budget the logits of an image are shifted so that its blocks are high with
    probabilities that add up to it. A high block then earns its saving and a low one the negative
    of that; with `entropy_weight`, probabilities far from the budget's share cost their divergence
    from it, too.

    Args:
        logits: (N, Gh, Gw) float32.
        saving: (N, Gh, Gw) float32, in standard deviations from its mean; no gradient.

    Returns:
        A scalar.
    """
    n, blocks = len(logits), logits[0].numel()
    shares = (torch.arange(BUDGETS, device=logits.device) + 0.5) / BUDGETS
    every = logits.expand(BUDGETS, *logits.shape)  # S,N,Gh,Gw
    counts = (shares * blocks).repeat_interleave(n)
    shift = shift_to_count(every.flatten(0, 1), counts).unflatten(0, (BUDGETS, n))
    shifted = every - shift
    loss = -((2 * shifted.sigmoid() - 1) * saving).mean()
    if entropy_weight:
        divergence = divergence_from_share(shifted, shares[:, None, None, None])
        loss = loss + entropy_weight * divergence.mean()
    return loss
