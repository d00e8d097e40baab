"""Exactly k blocks of an image, drawn at random by their logits."""

import torch
from torch import Tensor

from ..ops import select_budget

_HALVINGS = 24  # the shift is then known to 2⁻²⁴ of the range of the logits


def shift_to_count(logits: Tensor, count: int) -> Tensor:
    """The shift s of each image for which Σ sigmoid(logit - s) over its blocks is `count`.

    A policy of independent blocks, moved by one number until it spends the budget on average: it
    says how probable each block is when `count` of them must be high. 0 and all blocks count as
    half a block less extreme, where no finite shift would do.

    Args:
        logits: (N, Gh, Gw) float32.
        count: blocks per image, 0 to Gh*Gw.

    Returns:
        (N, 1, 1) float32, without gradient.
    """
    flat = logits.detach().flatten(1)  # N,Gh*Gw
    blocks = flat.shape[1]
    wanted = min(max(count, 0.5), blocks - 0.5)
    # sigmoid(reach) is the mean that is wanted, so the answer is between these two.
    reach = torch.logit(torch.tensor(wanted / blocks, dtype=torch.float64)).item()
    low = flat.amin(1, keepdim=True) - reach
    high = flat.amax(1, keepdim=True) - reach
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_many = (flat - middle).sigmoid().sum(1, keepdim=True) > wanted
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return ((low + high) / 2)[:, :, None]


def sample_count(logits: Tensor, count: int, uniform: Tensor) -> Tensor:
    """Draw exactly `count` blocks of each image: those with the highest logit plus logistic noise.

    Without the count, a block whose logit plus logistic noise is positive is a Bernoulli draw of
    its probability; ranking the sums keeps that order and fixes the number (as Gumbel-top-k does
    for a softmax).

    Args:
        logits: (N, Gh, Gw) float32.
        count: blocks per image, 0 to Gh*Gw.
        uniform: (N, Gh, Gw) float32, random numbers from 0 to 1.

    Returns:
        (N, Gh, Gw) bool.
    """
    return select_budget(logits.detach() + uniform.logit(eps=1e-6), count)
