"""Convolution of small dense maps in one launch each: `small_conv.cu`."""

import functools
import struct
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.cuda import geometry as geo
from ..ops.cuda.module import MUCH_SHARED, defines, prepare, shared_memory
from .steps import Affine

MOST_PARTS = 4
_CHUNK = 32  # input channels that a lane's copies come from
_COLUMNS = 64  # what weights are padded to: the widest tile


@dataclass(frozen=True)
class Tile:
    """16·rows × 8·columns outputs a thread block; warps that share the inner dimension."""

    rows: int
    columns: int
    warps: int


def choose_tile(rows: int, columns: int, shared: int) -> Tile:
    """Small tiles until they would no longer fit on the device together.

    Args:
        rows: output pixels; columns: output channels.
        shared: bytes of shared memory of a multiprocessor.
    """
    tiles = -(-rows // 32) * -(-columns // 32)
    if tiles <= 66:  # half of a large GPU's multiprocessors
        return Tile(1, 4, 16 if shared >= MUCH_SHARED else 8)
    # Larger tiles read less: 1×1 from 512 to 128 channels, 8192 pixels, takes 10 µs, not 18.
    return Tile(2, 4, 8) if tiles <= 528 else Tile(4, 8, 2)


@dataclass(frozen=True)
class SmallConv:
    """A convolution with its parameters as the kernel reads them; call it with maps.

    Attributes:
        parts: channels of each map; they lie side by side along the channels of the input.
        cout: output channels.
        channels: those of a tap as packed.
    """

    weights: Tensor
    bias: Tensor
    pre: Tensor | None
    parts: tuple[int, ...]
    cout: int
    channels: int
    size: int
    stride: int
    padding: int
    relu: bool

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        bias: Tensor,
        dtype: torch.dtype,
        parts: tuple[int, ...] = (),
        stride: int = 1,
        padding: int = 0,
        pre: Affine | None = None,
        relu: bool = False,
    ) -> "SmallConv":
        """Lay parameters out for the kernel.

        Args:
            weight: (COUT, CIN, k, k); bias: (COUT,); both float32 or wider.
            dtype: float16 or bfloat16, of the maps.
            pre: affine and ReLU on the input, of a 1×1 convolution.
            relu: after the bias.
        """
        cout, _, size, _ = weight.shape
        parts = parts or (weight.shape[1],)
        matrix = weight.permute(2, 3, 1, 0)  # k,k,CIN,COUT
        pieces = [_pad(piece, 2, _CHUNK) for piece in matrix.split(parts, 2)]
        matrix = _pad(torch.cat(pieces, 2), 3, _COLUMNS)
        channels, padded = matrix.shape[2:]
        packed = matrix.reshape(-1, _CHUNK, padded).transpose(1, 2)
        if pre is not None:
            both = torch.stack((pre.scale, pre.shift)).float()
            both = torch.cat([_pad(piece, 1, _CHUNK) for piece in both.split(parts, 1)], 1)
        return cls(
            packed.to(dtype).contiguous(),
            _pad(bias.float(), 0, _COLUMNS).contiguous(),
            None if pre is None else both.contiguous(),
            tuple(parts),
            cout,
            channels,
            size,
            stride,
            padding,
            relu,
        )

    def __call__(self, *maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, h, w, C) contiguous maps → (N, oh, ow, COUT), channels rounded up to 8 in both.

        Args:
            size: (oh, ow), to which maps are resized bilinearly; of a 1×1 convolution.
        """
        n, height, width, _ = maps[0].shape
        if size is None:
            size = tuple(
                (side + 2 * self.padding - self.size) // self.stride + 1 for side in (height, width)
            )
        rows, pitch = n * size[0] * size[1], round_up(self.cout, 8)
        out = maps[0].new_empty((n, *size, pitch))
        tile = choose_tile(rows, self.cout, shared_memory(out.device.index))
        resized = any(tuple(x.shape[1:3]) != size for x in maps) and self.size == 1
        resized = resized and self.stride == 1
        ahead = 1 if resized else 2 if self.pre is not None else 3
        options = _options(
            out.dtype,
            (self.size, len(maps), resized, self.pre is not None, self.relu, ahead),
            tile,
        )
        prepare(
            "small_conv.cu",
            "small_conv",
            options,
            out.device.index,
            -(-rows // (16 * tile.rows)),
            32 * tile.warps,
            self._maps(maps, size) + self._sizes(rows, size, pitch),
            shared=_shared(tile, ahead, resized, self.pre is not None),
            rows=-(-self.cout // (8 * tile.columns)),
        ).launch(
            out.device,
            self.weights.data_ptr(),
            self.bias.data_ptr(),
            0 if self.pre is None else self.pre.data_ptr(),
            out.data_ptr(),
        )
        return out

    def _maps(self, maps: tuple[Tensor, ...], size: tuple[int, int]) -> bytes:
        record, start = b"", 0
        for x, channels in zip(maps, self.parts):
            _, height, width, pitch = x.shape
            scales = (height / size[0], width / size[1])
            record += struct.pack("Q4i2f", x.data_ptr(), height, width, pitch, start, *scales)
            start += round_up(channels, _CHUNK)
        return record + bytes(32 * (MOST_PARTS - len(maps)))

    def _sizes(self, rows: int, size: tuple[int, int], pitch: int) -> bytes:
        padded = self.weights.shape[1]
        sizes = (rows, *size, pitch, self.stride, self.padding, self.channels, padded)
        return struct.pack("8i", *sizes) + struct.pack("3Ii", *geo.divider(self.channels // 32), 0)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _pad(x: Tensor, dim: int, multiple: int) -> Tensor:
    """Zeros up to a multiple along one dimension."""
    missing = -x.shape[dim] % multiple
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing))


def _shared(tile: Tile, ahead: int, resized: bool, pre: bool) -> int:
    """Bytes of dynamic shared memory: SHARED of the kernel."""
    places = 2 * tile.rows * (4 if resized else 1) + tile.columns + 4 * pre
    shares = 16 * tile.rows * (8 * tile.columns + 8) * 4
    return tile.warps * max(ahead * places * 512, shares)


@functools.cache
def _options(
    dtype: torch.dtype, what: tuple[int, int, bool, bool, bool, int], tile: Tile
) -> tuple[str, ...]:
    size, parts, resized, pre, relu, ahead = what
    return defines(
        dtype=geo.DTYPES[dtype],
        vector=8,
        index64=False,
        size=size,
        parts=parts,
        resized=resized,
        pre=pre,
        relu=relu,
        ahead=ahead,
        m=tile.rows,
        n=tile.columns,
        warps=tile.warps,
    )
