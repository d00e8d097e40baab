"""From bytes to what networks take, and back."""

import functools

import torch
from torch import Tensor

from dataloaders.jitter import jittered

# Of the Cityscapes training images, over 0..1; used for every data set, as published.
MEAN = (73.1584 / 255, 82.9090 / 255, 72.3924 / 255)
STD = (44.9149 / 255, 46.1529 / 255, 45.3192 / 255)


def to_network(
    image: Tensor, label: Tensor, changes: Tensor | None = None, channels_last: bool = False
) -> tuple[Tensor, Tensor]:
    """A batch of bytes (N,3,H,W) and (N,H,W), on any device, as networks take it: normalised
    float32 and int64. A batch that is so already passes unchanged.

    `changes` (N,4,2) float32, of `train_transform(jitter_later=True)`, is the colour jitter still
    to be applied, on CUDA by kernels of Triton. The memory format of the images is channels-last if
    asked for, otherwise contiguous.
    """
    if changes is not None and image.is_cuda:
        from dataloaders.jitter_cuda import jitter_and_normalise  # not everywhere is Triton there

        image = jitter_and_normalise(image, changes, *_constants(image.device), channels_last)
        return image, label.long()
    if changes is not None:
        image = torch.stack([jittered(*one) for one in zip(image, changes.tolist())])
    form = torch.channels_last if channels_last else torch.contiguous_format
    image = image.contiguous(memory_format=form)
    if image.dtype == torch.uint8:
        mean, std = _constants(image.device)
        image = image.float().div_(255).sub_(mean).div_(std)
    return image, label.long()


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    # Made once: a copy from the host would make every step wait for the device.
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
    return mean, std


def denormalise(image: Tensor) -> Tensor:
    """(...,3,H,W) normalised float -> uint8 pixels, for pictures."""
    mean, std = (image.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (image * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
