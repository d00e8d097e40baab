"""How soft probabilities are."""

import torch.nn.functional as F
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Of a Bernoulli variable of each logit, in nats."""
    return F.softplus(logits) - logits * logits.sigmoid()


def divergence_from_share(logits: Tensor, share: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a Bernoulli variable of each logit from one of probability
    `share` (broadcast, between 0 and 1), in nats.

    Entropy alone, the divergence from one half, would pull the share towards one half.
    """
    wanted = share.logit()
    return F.softplus(wanted) - logits.sigmoid() * wanted - entropy(logits)
