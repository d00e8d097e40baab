"""The learned policy in four launches: three convolutions, then scores, choice and places."""

import copy
import struct
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.cuda import geometry as geo
from ..ops.cuda.grid import fits_one_launch
from ..ops.cuda.module import defines, prepare
from ..policy import Policy
from ..policy.network import NET_STRIDE, PolicyNet
from ..policy.reinforce import ReinforcePolicy
from .small_conv import SmallConv

_TILE = (4, 16)  # output pixels of a thread block of the first layer


@dataclass(frozen=True)
class Chosen:
    """What a budget makes of an image: scores, grid (N, Gh, Gw) and places (see `build_slots`)."""

    scores: Tensor
    grid: Tensor
    slot: Tensor
    cells: Tensor


class PolicyKernels:
    """A `PolicyNet` whose batch norms are folded, packed for its kernels; half precision.

    Args:
        net: as from `of`, which says whether it fits.
        place: see `ReinforcePolicy`.
    """

    def __init__(
        self, net: PolicyNet, convolutions: list[nn.Conv2d], place: Tensor, dtype: torch.dtype
    ):
        first, second, third, last = convolutions
        device = first.weight.device
        self.dtype = dtype
        self.step = net.block_size // NET_STRIDE
        lines = first.weight.new_zeros((7, 8, 4, 64))  # dy,dx,c,cout
        lines[:, :7, :3] = first.weight.permute(2, 3, 1, 0)
        self.first = lines.reshape(7, 32, 64).transpose(1, 2).to(dtype).contiguous()
        # Copies: the module may be converted in place, and a parameter with it.
        self.first_bias = first.bias.detach().float().clone()
        self.middle = [
            SmallConv.pack(c.weight.float(), c.bias, dtype, stride=2, padding=2, relu=True)
            for c in (second, third)
        ]
        self.last = last.weight[0].permute(1, 2, 0).reshape(25, 64).to(dtype).contiguous()
        self.last_bias = last.bias.detach().float().clone()
        self.place = place.float().clone() if place.any() else None
        self.arrived = torch.zeros(1, dtype=torch.int32, device=device)

    @classmethod
    def of(cls, policy: Policy, dtype: torch.dtype) -> "PolicyKernels | None":
        """For a learned policy as this package builds it; None for any other.

        Args:
            policy: on the device, its batch norms folded into the convolutions.
        """
        net = getattr(policy, "policy_net", None)
        own = type(policy).scores is ReinforcePolicy.scores and type(net) is PolicyNet
        if not own or net.block_size % NET_STRIDE:
            return None
        layers = [layer for layer in net.layers if not isinstance(layer, nn.Identity)]
        kinds = [nn.Conv2d, nn.ReLU] * 3 + [nn.Conv2d]
        if [type(layer) for layer in layers] != kinds:
            return None
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        shapes = [(64, 3, 7, 7), (64, 64, 5, 5), (64, 64, 5, 5), (1, 64, 5, 5)]
        for layer, shape, stride in zip(convolutions, shapes, (4, 2, 2, 2)):
            window = (layer.stride, layer.padding, layer.dilation, layer.padding_mode)
            wanted = ((stride,) * 2, (shape[2] // 2,) * 2, (1, 1), "zeros")
            if tuple(layer.weight.shape) != shape or window != wanted or layer.bias is None:
                return None
        return cls(net, convolutions, policy.place, dtype)

    def for_another_stream(self) -> "PolicyKernels":
        """The same weights, for launches that may run while those of this one do."""
        other = copy.copy(self)
        other.arrived = torch.zeros_like(self.arrived)
        return other

    def scores(self, image: Tensor) -> Tensor:
        """(N, Gh, Gw) float32 logits of an image (N, 3, H, W) of any strides."""
        x = self._features(image)
        scores = self._new_scores(x)
        self._last(x, scores, None, 0)
        return scores

    def spend(self, image: Tensor, count: int) -> Chosen | None:
        """Scores and what `select_budget` and `build_slots` make of them; None for large grids."""
        images, rows, columns = self._grid(image.shape[0], *image.shape[2:])
        if not fits_one_launch(images, images * rows * columns):
            return None
        x = self._features(image)
        scores = self._new_scores(x)
        chosen = Chosen(
            scores,
            torch.empty(scores.shape, dtype=torch.bool, device=x.device),
            torch.empty(scores.shape, dtype=torch.int32, device=x.device),
            torch.empty(scores.numel(), dtype=torch.int32, device=x.device),
        )
        self._last(x, scores, chosen, count)
        return chosen

    def _grid(self, n: int, height: int, width: int) -> tuple[int, int, int]:
        block = self.step * NET_STRIDE
        return n, height // block, width // block

    def _features(self, image: Tensor) -> Tensor:
        """(N, 2 Gh, 2 Gw, 64), what the last layer reads."""
        image = image.to(self.dtype)
        n, _, height, width = image.shape
        height, width = height // self.step, width // self.step
        out = torch.empty((n, height // 4, width // 4, 64), dtype=self.dtype, device=image.device)
        tiles = [-(-size // tile) for size, tile in zip(out.shape[1:3], _TILE)]
        strides = [image.stride(i) * (1 if i < 2 else self.step) for i in range(4)]
        sizes = (height, width, *out.shape[1:3], tiles[1], 64)
        prepare(
            "policy.cu",
            "policy_first",
            self._options(),
            image.device.index,
            tiles[0] * tiles[1],
            256,
            struct.pack("4q6i", *strides, *sizes),
            rows=n,
        ).launch(image.device, *(t.data_ptr() for t in (image, self.first, self.first_bias, out)))
        for convolution in self.middle:
            out = convolution(out)
        return out

    def _new_scores(self, x: Tensor) -> Tensor:
        n, height, width, _ = x.shape
        shape = (n, height // 2, width // 2)
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def _last(self, x: Tensor, scores: Tensor, chosen: Chosen | None, count: int) -> None:
        made = (chosen.grid, chosen.slot, chosen.cells) if chosen else ()
        pointers = [t.data_ptr() for t in made] or [0, 0, 0]
        total = scores.numel()
        choice = (total, scores[0].numel(), count, 0)
        prepare(
            "policy.cu",
            "policy_scores",
            self._options(),
            x.device.index,
            -(-total // 8),
            256,
            struct.pack("8i", *choice, *x.shape[1:3], *scores.shape[1:]),
            pointers=9,
        ).launch(
            x.device,
            *(t.data_ptr() for t in (x, self.last, self.last_bias)),
            0 if self.place is None else self.place.data_ptr(),
            scores.data_ptr(),
            self.arrived.data_ptr(),
            *pointers,
        )

    def _options(self) -> tuple[str, ...]:
        return defines(dtype=geo.DTYPES[self.dtype], vector=8, index64=False)
