"""`DualResTensor`: an image held as blocks of two resolutions, on which torch functions act."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .dispatch import apply, current_recorder
from .fast.pending import Pending
from .grid import BlockGrid
from .ops import combine, split
from .ops.reference import combine as combine_labels


@dataclass(frozen=True)
class Padding:
    """Padding that `F.pad` asked for and that the next convolution or pooling will take up."""

    left: int
    right: int
    top: int
    bottom: int
    replicate: bool = False
    fill: float = 0.0


class DualResTensor:
    """A (N, C, H, W) image stored as high- and low-resolution blocks in one pixel buffer.

    Torch functions and methods act on it as `segblocks.rules` defines; an operation that cannot be
    right on blocks raises NotImplementedError. `shape` is that of the full-resolution picture.

    Attributes:
        pixels: (P, C), all high blocks row by row, then all low blocks at half the side.
        grid: where each block lies, shared by identity with every tensor of the forward pass.
        block: side of a high block in pixels at this tensor's scale.
        layout: "NCHW"; "NHWC" after `permute(0, 2, 3, 1)`; "NHW" after a reduction over channels.
        padding: set by `F.pad`, taken up by the next windowed operation.
    """

    __slots__ = ("_value", "block", "grid", "layout", "padding")

    def __init__(
        self,
        pixels: Tensor | Pending,
        grid: BlockGrid,
        block: int,
        layout: str = "NCHW",
        padding: Padding | None = None,
    ):
        self._value = pixels
        self.grid = grid
        self.block = block
        self.layout = layout
        self.padding = padding

    @property
    def pixels(self) -> Tensor:
        """(P, C), computed by now. Its owner may do with it what he likes; rules read `stored`."""
        value = self._value
        self._leaves("pixels of blocks are taken")
        if self.is_cuda and not torch.compiler.is_compiling():
            self.grid.later.expose()
        return value if isinstance(value, Tensor) else value.read()

    @property
    def stored(self) -> Tensor:
        """`pixels` for functions that only read them, or say when they write (`Later.write`)."""
        value = self._value
        return value if isinstance(value, Tensor) else value.read()

    def like(self, pixels: Tensor | Pending, block: int | None = None) -> "DualResTensor":
        """The same blocks with other pixels, and possibly at another scale."""
        return DualResTensor(pixels, self.grid, block or self.block, self.layout)

    # -- the two resolutions ---------------------------------------------------------------------

    @property
    def highres(self) -> Tensor:
        """(n_high, C, b, b), a channels_last view of the buffer."""
        rows = self.grid.n_high * self.block**2
        return _as_blocks(self.pixels[:rows], self.grid.n_high, self.block)

    @property
    def lowres(self) -> Tensor:
        """(n_low, C, b/2, b/2), a channels_last view of the buffer."""
        rows = self.grid.n_high * self.block**2
        return _as_blocks(self.pixels[rows:], self.grid.n_low, self.block // 2)

    def combine(self, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
        """Join the blocks into one dense (N, C, H, W) image (N, H, W without channels).

        High blocks as stored; low ones bilinear ×2 with their neighbours' pixels (labels, that is
        integer tensors, are repeated instead).
        """
        self._leaves("blocks are combined")
        return self._combine(memory_format)

    def _leaves(self, what: str) -> None:
        """Tell who records that the caller has values now, to do with them what he likes."""
        recorder = current_recorder()
        if recorder is not None:
            recorder.obstruct(f"{what} in the middle of the network, outside segblocks.no_blocks")

    def _combine(self, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
        """`combine`, for who is part of the network himself."""
        self.refuse_padding()
        join = combine if self._value.is_floating_point() else combine_labels
        image = join(
            self.stored.contiguous(),
            self.grid.slot,
            self.grid.cells,
            self.grid.n_high,
            self.block,
            self.grid.legacy_upsample,
            memory_format == torch.channels_last,
        )
        if self.layout == "NHW":
            return image[:, 0]
        return image.permute(0, 2, 3, 1) if self.layout == "NHWC" else image

    def refuse_padding(self) -> None:
        """Raise when padding by `F.pad` is still waiting for a windowed operation."""
        if self.padding:
            raise NotImplementedError(
                "F.pad on blocks must be followed directly by a convolution or pooling that takes "
                "the padding up; wrap the function that pads in segblocks.no_blocks"
            )

    # -- what networks ask of a tensor -----------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        n, gh, gw = self.grid.shape
        channels, height, width = self._value.shape[1], gh * self.block, gw * self.block
        if self.padding:
            height += self.padding.top + self.padding.bottom
            width += self.padding.left + self.padding.right
        if self.layout == "NCHW":
            return torch.Size((n, channels, height, width))
        return torch.Size(
            (n, height, width, channels) if self.layout == "NHWC" else (n, height, width)
        )

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.layout)

    ndim = property(dim)
    dtype = property(lambda self: self._value.dtype)
    device = property(lambda self: self._value.device)
    requires_grad = property(lambda self: self._value.requires_grad)
    is_cuda = property(lambda self: self._value.is_cuda)

    def is_floating_point(self) -> bool:
        return self._value.is_floating_point()

    def contiguous(self, memory_format: torch.memory_format | None = None) -> "DualResTensor":
        """Itself: there is one storage order."""
        return self

    def __repr__(self) -> str:
        return (
            f"DualResTensor(shape={tuple(self.shape)}, block={self.block}, "
            f"high={self.grid.n_high}/{self.grid.n_blocks}, dtype={self.dtype}, "
            f"device={self.device})"
        )

    def __getattr__(self, name: str) -> Callable:
        function = getattr(Tensor, name, None)
        if name.startswith("__") or not callable(function):
            raise AttributeError(
                f"'DualResTensor' object has no attribute {name!r}; wrap the module or function "
                "that needs it in segblocks.no_blocks"
            )
        return lambda *args, **kwargs: apply(function, (self, *args), kwargs, name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args=(), kwargs=None):
        return apply(func, args, kwargs or {})


def _operator(name: str) -> Callable:
    function = getattr(Tensor, name)

    def method(self, *args):
        return apply(function, (self, *args), {}, name)

    return method


# Python looks operators up on the class, past __getattr__.
for _name in (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv pow rpow ipow neg abs "
    "lt le gt ge eq ne and or iand ior invert matmul rmatmul bool getitem setitem"
).split():
    setattr(DualResTensor, f"__{_name}__", _operator(f"__{_name}__"))


def to_blocks(x: Tensor, grid: Tensor | BlockGrid, legacy_upsample: bool = False) -> DualResTensor:
    """Cut an image into blocks of two resolutions.

    Args:
        x: (N, C, H, W) floating point; H and W are Gh and Gw times one even block size.
        grid: (N, Gh, Gw) bool, True = full resolution; or bookkeeping that exists already.
        legacy_upsample: resize inside each block alone, as the published release did.

    Raises:
        ValueError: shapes that do not fit; TypeError: not floating point, or a grid of other type.
    """
    return cut_image(x, grid, legacy_upsample)


def cut_image(
    x: Tensor, grid: Tensor | BlockGrid, legacy_upsample: bool = False, at_once: bool = True
) -> DualResTensor:
    """`to_blocks`.

    Args:
        at_once: False where the image stays as it is until a network has read it: if the first
            convolution takes it whole, its blocks are never made.
    """
    if isinstance(grid, Tensor) and isinstance(x, Tensor) and grid.device != x.device:
        raise ValueError(
            f"image is on {x.device} and grid on {grid.device}; move one: grid.to(image.device)"
        )
    if not isinstance(grid, BlockGrid):
        grid = BlockGrid.from_mask(grid, legacy_upsample=legacy_upsample)
    elif legacy_upsample and not grid.legacy_upsample:
        raise ValueError(
            "legacy_upsample=True with a BlockGrid that was made without: give it to "
            "BlockGrid.from_mask, or give the mask"
        )
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4:
        given = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"image must be a floating-point tensor (N, C, H, W); got {given}")
    n, gh, gw = grid.shape
    block = x.shape[2] // gh
    if x.shape[0] != n or (gh * block, gw * block) != tuple(x.shape[2:]) or block % 2 or not block:
        raise ValueError(
            f"image {tuple(x.shape)} cannot be cut by grid {(n, gh, gw)}: the batch must match and "
            f"H/Gh = W/Gw must be one even block size; pad the image or choose another grid"
        )
    if x.shape[1] == 3 and x.is_cuda and not torch.compiler.is_compiling():
        return DualResTensor(_first().cut(x, grid, block, at_once), grid, block)
    return DualResTensor(split(x, grid.slot, grid.cells, grid.n_high, block), grid, block)


@functools.cache
def _first() -> ModuleType:
    """The first convolution; only CUDA tensors need what it needs."""
    return importlib.import_module("segblocks.fast.first")


def _as_blocks(pixels: Tensor, n: int, side: int) -> Tensor:
    return pixels.view(n, side, side, pixels.shape[1]).permute(0, 3, 1, 2)
