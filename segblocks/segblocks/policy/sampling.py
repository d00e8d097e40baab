"""Exactly k blocks of an image, drawn at random by their logits."""

import torch
from torch import Tensor

from ..ops import select_budget

# The shift is sought in so many rounds among so many parts, and then known to 2⁻²⁴ of the range of
# the logits. By halvings it would be as well, but a launch on small tensors takes its time whatever
# it does.
_ROUNDS, _PARTS = 3, 256


def shift_to_count(logits: Tensor, count: int | Tensor) -> Tensor:
    """The shift s of each image for which Σ sigmoid(logit - s) over its blocks is `count`.

    A policy of independent blocks, moved by one number until it spends the budget on average: it
    says how probable each block is when `count` of them must be high. 0 and all blocks count as
    half a block less extreme, where no finite shift would do.

    Args:
        logits: (N, Gh, Gw) float32.
        count: blocks per image, 0 to Gh*Gw; of each image, as (N,) float32, or of all.

    Returns:
        (N, 1, 1) float32, without gradient.
    """
    flat = logits.detach().flatten(1)  # N,Gh*Gw
    blocks = flat.shape[1]
    # sigmoid(reach) is the mean that is wanted, so the answer is between low and low + width.
    if isinstance(count, Tensor):
        wanted = count[:, None].clamp(0.5, blocks - 0.5)  # N,1
        reach = torch.logit(wanted / blocks)
    else:
        wanted = min(max(count, 0.5), blocks - 0.5)
        reach = torch.logit(torch.tensor(wanted / blocks, dtype=torch.float64)).item()
    low = flat.amin(1, keepdim=True) - reach  # N,1
    width = flat.amax(1, keepdim=True) - reach - low
    parts = torch.arange(1, _PARTS, device=flat.device)
    for _ in range(_ROUNDS):
        width = width / _PARTS
        shifts = low + width * parts  # N,255
        too_many = (flat[:, None] - shifts[:, :, None]).sigmoid().sum(2) > wanted
        low = low + width * too_many.sum(1, keepdim=True)
    return (low + width / 2)[:, :, None]


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
