"""Convolution of blocks outside a compiled model: one Hopper launch in place of pad, two
convolutions and a join. For inference in half precision; everything else takes the general way."""

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.library import launches_directly
from ..tensor import DualResTensor
from .hopper import Fused, Tile, choose_tile, convolve, pack_weights
from .stem import fill_averages
from .tables import Scale, TableKey, build_tables

# Weights as the kernel wants them, with the version of the tensor that they were made from.
_PACKED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _applies(x: DualResTensor, weight: Tensor, bias: Tensor | None) -> bool:
    pixels = x.pixels
    if pixels.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != pixels.dtype:
        return False
    parameters = (weight,) if bias is None else (weight, bias)
    if not launches_directly(pixels) or any(p.is_inference() for p in parameters):
        return False  # inference tensors do not count their changes
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        return False
    whole = weight.shape[1] % 64 == 0 and weight.shape[0] % 64 == 0 and pixels.is_contiguous()
    return whole and _is_hopper(pixels.device)


def conv2d(
    x: DualResTensor, weight: Tensor, bias: Tensor | None, stride: int
) -> DualResTensor | None:
    """A 3×3 (padding 1) or 1×1 convolution of stride 1 or 2; None where this way is not open."""
    if not _applies(x, weight, bias):
        return None
    grid, pixels = x.grid, x.pixels
    n_blocks = grid.cells.numel()
    source = Scale.of(x.block, grid.n_high, n_blocks)
    scale = Scale.of(x.block // stride, grid.n_high, n_blocks)
    taps = weight.shape[2] ** 2
    own = _table(x, TableKey(scale.block, centre=True))[0]
    table = _table(x, TableKey(source.block, stride, centre=taps == 1))
    averages = None
    if taps > 1:
        averages = pixels.new_empty((source.zero - source.rows + 1, pixels.shape[1]))
        here = own if stride == 1 else _table(x, TableKey(source.block, centre=True))[0]
        fill_averages(pixels, here, averages, source)
    packed, shift = _packed(weight, bias)
    cout = weight.shape[0]
    out = pixels.new_empty((scale.rows, cout))
    convolve(
        Fused(taps=taps, averages=False, separate=taps > 1),
        _unsplit(choose_tile(scale.rows, cout, packed.shape[0])),
        scale,
        pixels,
        packed,
        shift,
        out,
        (weight.shape[1], 0, cout),
        own,
        table,
        averages=averages,
        stored=source.rows,
    )
    return x.like(out, scale.block)


def _table(x: DualResTensor, key: TableKey) -> Tensor:
    """A table of the tensor's grid, kept with the grid."""
    tables = x.grid.tables
    if key not in tables:
        tables.update(build_tables(x.grid.slot, x.grid.cells, x.grid.n_high, [key]))
    return tables[key]


def _version(x: Tensor | None) -> tuple | None:
    """Changes whenever the tensor is written to or its storage is replaced."""
    return None if x is None else (x.data_ptr(), x.dtype, x._version)


def _packed(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    version = (_version(weight), _version(bias))
    found = _PACKED.get(weight)
    if found is None or found[0] != version:
        cout = weight.shape[0]
        matrix = weight.detach().permute(2, 3, 1, 0).reshape(-1, cout)
        packed = pack_weights(matrix, weight.shape[2] ** 2)
        shift = torch.zeros(packed.shape[1], device=weight.device)
        if bias is not None:
            shift[:cout] = bias.detach()
        found = (version, packed, shift)
        _PACKED[weight] = found
    return found[1], found[2]


@functools.cache
def _unsplit(tile: Tile) -> Tile:
    return Tile(tile.rows, tile.columns, tile.stages, tile.resident, tile.producers, 1)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9
