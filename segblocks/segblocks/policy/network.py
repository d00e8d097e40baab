"""The small network that looks at an image and says something of each block."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..graphs import TrainingGraphs

NET_STRIDE = 32


class PolicyNet(nn.Module):
    """Image (N, 3, H, W) → one logit a block (N, Gh, Gw), at 32 input pixels a block side."""

    def __init__(self, block_size: int):
        super().__init__()
        self.block_size = block_size
        self.graphs: TrainingGraphs | None = None

        def norm() -> nn.BatchNorm2d:
            return nn.BatchNorm2d(64, momentum=0.02)

        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=4, padding=3, bias=False),
            norm(),
            nn.ReLU(),
            nn.Conv2d(64, 64, 5, stride=2, padding=2, bias=False),
            norm(),
            nn.ReLU(),
            nn.Conv2d(64, 64, 5, stride=2, padding=2, bias=False),
            norm(),
            nn.ReLU(),
            nn.Conv2d(64, 1, 5, stride=2, padding=2),
        )

    def forward(self, image: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`change` is applied to the small image that the layers look at."""
        step, rest = divmod(self.block_size, NET_STRIDE)
        if rest == 0:
            small = image[:, :, ::step, ::step]  # what "nearest" picks, without reading the rest
        else:
            sides = [length // self.block_size * NET_STRIDE for length in image.shape[2:]]
            small = F.interpolate(image, size=sides, mode="nearest")
        small = small if change is None else change(small)
        if self.graphs is None:
            return self.layers(small)[:, 0]
        return self.graphs(self.layers, self.layers, (small,))[:, 0]
