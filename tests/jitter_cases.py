"""Jitter of a batch by the kernels against the workers' own: `python jitter_cases.py` with
TRITON_INTERPRET=1 runs the small ones on the CPU."""

import itertools

import torch
from torch import Tensor

from dataloaders import to_network
from dataloaders.jitter import NOTHING
from dataloaders.jitter_cuda import jitter_and_normalise
from dataloaders.normalise import MEAN, STD

ORDERS = list(itertools.permutations(range(4)))
FACTORS = [  # brightness, contrast, saturation, hue
    (1.3, 0.7, 1.3, 0.1),
    (0.7, 1.3, 0.7, -0.1),
    (0.0, 2.0, 0.0, 1 / 6),
    (2.0, 0.0, 2.0, -1 / 6),
    (1.0, 1.0, 1.0, 0.0),
]


def changes_of(*rows: dict[int, float]) -> Tensor:
    """(N,4,2) float32 of up to four changes each, in their order."""
    filled = [[*row.items()] + [(NOTHING, 1.0)] * (4 - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.float32)


def alone() -> Tensor:
    """(20,4,2): every change with every factor and no other, then (1,4,2) with none at all."""
    return changes_of(*({i: f[i]} for i in range(4) for f in FACTORS), {})


def together() -> Tensor:
    """(24,4,2): all orders, with factors that take turns."""
    factors = itertools.cycle(FACTORS)
    return changes_of(*({i: f[i] for i in order} for order, f in zip(ORDERS, factors)))


def pictures(count: int, height: int, width: int) -> Tensor:
    """(N,3,H,W) uint8: noise, and in bands black, white, grey and colours at the end of a scale."""
    generator = torch.Generator().manual_seed(height * width)
    image = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    image[..., : width // 6] = torch.where(image[..., : width // 6] > 127, 255, 0).to(torch.uint8)
    grey = slice(width // 6, width // 3)
    image[..., grey] = image[:, :1, :, grey]
    image[:, :, : height // 8, -(width // 4) :] = 0
    image[:, :, height // 8 : height // 4, -(width // 4) :] = 255
    return image


def check(image: Tensor, changes: Tensor, device: str, channels_last: bool = False) -> None:
    """Assert that `image` comes out as on the CPU: not one value in a thousand a level away."""
    label = torch.zeros(len(image), 1, 1)
    expected, _ = to_network(image, label, changes)
    mean, std = (torch.tensor(x, device=device) for x in (MEAN, STD))
    if device == "cpu":
        out = jitter_and_normalise(image, changes, mean, std, channels_last)
    else:
        where = image.to(device), label.to(device), changes.to(device)
        out = to_network(*where, channels_last=channels_last)[0]
    form = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=form)
    assert out.dtype == torch.float32
    away = (out.cpu() - expected).abs() * 255 * torch.tensor(STD).view(3, 1, 1)  # in levels
    assert away.max() < 1.001, f"{away.max()} levels away"
    others = [(one > 0.001).sum().item() for one in away]
    assert max(others) <= away[0].numel() / 1000 + 3, f"other values: {others}"  # 3: one pixel


def check_layouts(device: str, height: int, width: int) -> None:
    """Interleaved, planar and cut-out images, in and out."""
    image, changes = pictures(3, height, width), together()[[3, 8, 23]]
    interleaved = image.contiguous(memory_format=torch.channels_last)
    for layout in (image, interleaved, image.flip(-1)[..., 1:, :-2], interleaved[..., 2:, 1:]):
        for channels_last in (False, True):
            check(layout, changes, device, channels_last)


if __name__ == "__main__":
    for size in ((1, 1), (7, 13), (64, 65)):  # 65 rows: more than one program sums them
        check(pictures(21, *size), alone(), "cpu")
        check(pictures(24, *size), together(), "cpu")
    check_layouts("cpu", 33, 40)
    print("as on the CPU")
