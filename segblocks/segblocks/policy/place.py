"""What a policy says of each place in the picture, on average over some pictures.

Trained on few images, a policy knows them by heart, and what it says of another one is as much
chance as knowledge. Drawn towards the mean of what it says of such a place it is wrong less often,
as the estimators of James and Stein are; street scenes have their detail in much the same places.
Places are those of whole pictures, so of crops in training nothing can be said.
"""

import torch.nn.functional as F
from torch import Tensor

PLACES = (16, 16)  # rows and columns, over a picture of any size; policy.cu knows them, too


def mean_by_place(scores: Tensor) -> Tensor:
    """Scores (N, Gh, Gw) → their mean over the images at each place, `PLACES`."""
    return _resized(scores.float().mean(0), PLACES)


def at_blocks(place: Tensor, rows: int, columns: int) -> Tensor:
    """A value for every block (Gh, Gw), of its centre; of `PLACES` values."""
    return _resized(place, (rows, columns))


def _resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(values[None, None], size, mode="bilinear")[0, 0]
