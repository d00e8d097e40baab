"""Single-scale SwiftNet (Oršić et al., CVPR 2019, "In Defense of Pre-trained ImageNet
Architectures"): an encoder, spatial pyramid pooling and a light ladder of upsampling steps.

Parameter names are those of the published SegBlocks checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segblocks import no_blocks

DECODER_BN_MOMENTUM = 0.05
PYRAMID_BN_MOMENTUM = 0.005
PYRAMID_ROWS = (8, 4, 2)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of x (N,C,h,w) to (N,C,*size), corners not aligned."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


# A leaf in torch.fx graphs, because the bins depend on the size of the input.
@torch.fx.wrap
def pyramid_pool(x: Tensor, rows: int) -> Tensor:
    """Average x (N,C,H,W) over a grid of `rows` rows and about as many columns per unit of height.

    Returns (N,C,rows,columns) with columns = max(1, round(W / H * rows)): the values of
    `adaptive_avg_pool2d`, whose CUDA backward adds with atomics where bins overlap and so does
    not repeat bit for bit; the two forms here do.
    """
    height, width = x.shape[-2:]
    columns = max(1, round(width / height * rows))
    if height % rows == 0 and width % columns == 0:
        return F.avg_pool2d(x, (height // rows, width // columns))
    return _bin_weights(height, rows, x) @ x @ _bin_weights(width, columns, x).T


def _bin_weights(size: int, bins: int, like: Tensor) -> Tensor:
    """(bins,size): row i averages the positions floor(i·size/bins) ≤ p < ceil((i+1)·size/bins)."""
    position = torch.arange(size, device=like.device)
    index = torch.arange(bins, device=like.device).unsqueeze(1)
    start, end = index * size // bins, ((index + 1) * size + bins - 1) // bins
    inside = (position >= start) & (position < end)  # bins,size
    return inside.to(like.dtype) / (end - start).to(like.dtype)


class BNReluConv(nn.Module):
    """Batch norm, ReLU, then a convolution that keeps the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        momentum: float = DECODER_BN_MOMENTUM,
        bias: bool = False,
    ):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels, momentum=momentum)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        if bias:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(x)))


class SpatialPyramidPooling(nn.Module):
    """Context of the whole picture at three scales; always computed on the dense tensor.

    (N,in_channels,h,w) -> (N,features,h,w). Each level has features // 3 channels.
    """

    def __init__(self, in_channels: int, features: int):
        super().__init__()

        def layer(inputs: int, outputs: int) -> BNReluConv:
            return BNReluConv(inputs, outputs, 1, momentum=PYRAMID_BN_MOMENTUM)

        levels = len(PYRAMID_ROWS)
        level_features = features // levels
        self.spp = nn.ModuleDict({"spp_bn": layer(in_channels, features)})
        for i in range(levels):
            self.spp[f"spp{i}"] = layer(features, level_features)
        self.spp["spp_fuse"] = layer(features + levels * level_features, features)

    def forward(self, x: Tensor) -> Tensor:
        # Wrapped per call: a wrapper kept as an attribute would still hold this module's method
        # in a deep copy of the model.
        return no_blocks(self._pyramid)(x)

    def _pyramid(self, x: Tensor) -> Tensor:
        x = self.spp["spp_bn"](x)
        size = x.shape[-2:]
        levels = [x]
        for i, rows in enumerate(PYRAMID_ROWS):
            levels.append(resize(self.spp[f"spp{i}"](pyramid_pool(x, rows)), size))
        return self.spp["spp_fuse"](torch.cat(levels, dim=1))


class Upsample(nn.Module):
    """One step up the ladder: resize to the skip connection's size, add it, blend with a 3×3."""

    def __init__(self, skip_channels: int, features: int):
        super().__init__()
        self.bottleneck = BNReluConv(skip_channels, features, 1)
        self.blend_conv = BNReluConv(features, features, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.blend_conv(resize(x, skip.shape[-2:]) + self.bottleneck(skip))


class SwiftNet(nn.Module):
    """Image (N,3,H,W) -> logits (N,num_classes,H/4,W/4), for any H and W (odd sizes round up).

    `backbone` maps an image to its features at strides 4, 8, 16 and 32 and names their channel
    counts in `backbone.channels`. Uses ordinary torch functions only, so it runs unchanged on
    dense tensors and on tensors of blocks.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, features: int):
        super().__init__()
        *skips, deepest = backbone.channels
        self.backbone = backbone
        self.spp = SpatialPyramidPooling(deepest, features)
        self.upsample = nn.ModuleList(Upsample(channels, features) for channels in reversed(skips))
        self.logits = BNReluConv(features, num_classes, 1, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        *skips, x = self.backbone(image)
        x = self.spp(x)  # N,features,H/32,W/32
        for upsample, skip in zip(self.upsample, reversed(skips)):
            x = upsample(x, skip)
        return self.logits(x)  # N,num_classes,H/4,W/4
