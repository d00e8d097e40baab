"""The threshold at which a policy's scores spend a wanted share of blocks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def fit_threshold(
    scores: Sequence[Tensor], share: float, rounded_up: Callable[[int, int], int]
) -> tuple[float, float]:
    """Choose the threshold above which the blocks of some images make up `share` of all of them.

    Args:
        scores: (Gh, Gw) float of each image, images evaluated one at a time.
        share: wanted mean over the images, 0 to 1.
        rounded_up: (blocks above the threshold, blocks) of an image → blocks that run high.

    Returns:
        The threshold and the mean share at it, the closest to `share` that there is.

    Raises:
        ValueError: no images, or scores that are not finite.
    """
    if not scores:
        raise ValueError("a threshold cannot be fitted to no images: give scores of some")
    images = [image.detach().double().flatten().cpu() for image in scores]
    values = torch.cat(images).unique()  # ascending
    if not values.isfinite().all():
        raise ValueError("the policy's scores are not finite: its training has diverged")
    # A threshold between any two neighbours, and one on either side of all.
    thresholds = torch.cat((values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1))

    def realised(threshold: Tensor) -> float:
        shares = [rounded_up(int((x > threshold).sum()), len(x)) / len(x) for x in images]
        return sum(shares) / len(shares)

    low, high = 0, len(thresholds) - 1  # the share falls from one to the other
    while high - low > 1:
        middle = (low + high) // 2
        if realised(thresholds[middle]) > share:
            low = middle
        else:
            high = middle
    found = {float(thresholds[i]): realised(thresholds[i]) for i in (low, high)}
    return min(found.items(), key=lambda pair: abs(pair[1] - share))
