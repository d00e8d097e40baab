"""Pictures in other colours, for a policy to learn that these say little of where detail is.

Colour is the first thing that a policy knows its few training images by.
"""

import torch
from torch import Tensor

from ..replicas import Replicas

BRIGHTNESS, BALANCE = 0.5, 0.2  # how far the whole, and each channel, is from what it was
LIFT, TINT = 0.75, 0.3  # the same of what is added, in standard deviations of a pixel


def recoloured(image: Tensor, replicas: Replicas) -> Tensor:
    """Each image (N, 3, H, W), normalised, with channels mixed, scaled and shifted at random.

    Each new channel is a mean of the three with weights of its own: softmax of logistic numbers.
    """
    n, channels = image.shape[:2]
    drawn = replicas.uniform((n, channels + 4, channels), image.device)  # N,7,3
    mix, rest = drawn.split((channels, 4), 1)
    mix = mix.logit(eps=1e-6).softmax(2)  # N,new,old
    spread = 2 * rest - 1  # -1 to 1
    # Numbers of the whole image are the first of their rows.
    gain = (1 + BRIGHTNESS * spread[:, 0, :1]) * (1 + BALANCE * spread[:, 1])
    shift = LIFT * spread[:, 2, :1] + TINT * spread[:, 3]
    mixed = torch.einsum("nck,nkhw->nchw", (mix * gain[:, :, None]).to(image.dtype), image)
    return mixed + shift[:, :, None, None].to(image.dtype)
