"""From logits to class ids at the size of the labels, in memory that fits."""

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE_BYTES = 256 * 2**20  # of float32 scores at full size; Cityscapes fits in one slice


def predict(logits: Tensor, size: tuple[int, int], slice_bytes: int = SLICE_BYTES) -> Tensor:
    """Class ids (N,H,W) int64 at `size`: logits (N,classes,h,w) resized bilinearly, arg max.

    The resized scores of all classes would take 3 GB at 65 classes and 12 megapixels, so they are
    made for a few classes at a time, at most `slice_bytes` but at least one class, and only the
    best so far is kept. Resizing acts on each class alone, so the result is bit for bit that of all
    at once; of equal scores the first class wins, and NaN wins over numbers, as in torch.argmax.
    """
    # Contiguous: how torch resizes channels-last input depends on the number of channels.
    logits = logits.float().contiguous()
    plane = 4 * len(logits) * size[0] * size[1]  # bytes of one class
    best, prediction, first = None, None, 0
    for part in logits.split(max(1, slice_bytes // plane), dim=1):
        scores = F.interpolate(part, size, mode="bilinear", align_corners=False)  # N,k,H,W
        score, index = scores.max(dim=1)
        del scores
        if best is None:
            best, prediction = score, index
        else:
            best, better = torch.stack((best, score)).max(dim=0)
            prediction = torch.where(better == 1, index + first, prediction)
        first += part.shape[1]
    return prediction


def resize_labels(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Class ids (N,H,W) at `size`, by nearest pixel; the same tensor if it has that size."""
    if label.shape[-2:] == size:
        return label
    # float32 holds every id exactly.
    return F.interpolate(label[:, None].float(), size, mode="nearest-exact")[:, 0].to(label.dtype)
