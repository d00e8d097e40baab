"""Convolution and max pooling of blocks outside a compiled model, by the fast path's kernels: two
launches in place of pad, two library calls and a join. For inference in half precision.

Written for few Python steps: at batch 1 the host, not the GPU, sets the time of eager execution.
"""

import functools
import struct
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..grid import BlockGrid
from ..ops.cuda.launch import Kernel
from ..ops.cuda.module import prepare
from ..ops.library import launches_directly
from ..tensor import DualResTensor
from .hopper import Fused, Tile, choose_tile, convolve, pack_weights
from .tables import Scale, TableKey, build_tables

_HALVES = (torch.float16, torch.bfloat16)
_MOST_KEYS = 32
_Key = tuple[int, int, bool]  # block, stride, centre: a TableKey that hashes fast


class _Packed(NamedTuple):
    """Weights as the kernel wants them, and the versions of the tensors they were made from."""

    weight: weakref.ref
    versions: tuple
    matrix: Tensor
    shift: Tensor


# By the id of the weight, which the weak reference says is still the same tensor.
_PACKED: dict[int, _Packed] = {}
# By the first table that a grid needed and its shape: what such grids went on to need.
_WANTED: dict[tuple, list[_Key]] = {}


class _Plan(NamedTuple):
    """One convolution or pooling at one scale."""

    source: Scale
    scale: Scale
    own: _Key
    table: _Key
    here: _Key | None  # where the input's own pixels are; None where no averages are read
    averages: int  # rows
    channels: tuple[int, int, int]
    fused: Fused | None = None
    tile: Tile | None = None


def conv2d(
    x: DualResTensor, weight: Tensor, bias: Tensor | None, stride: int
) -> DualResTensor | None:
    """A 3×3 (padding 1) or 1×1 convolution of stride 1 or 2; None where this way is not open."""
    pixels = x.pixels
    if pixels.dtype not in _HALVES or not _applies(pixels, weight, bias):
        return None
    grid = x.grid
    cout, cin, kernel, _ = weight.shape
    plan = _plan(x.block, grid.n_high, grid.n_blocks, stride, kernel, cin, cout)
    averages = None if plan.here is None else _averages(pixels, grid, plan)
    out = pixels.new_empty((plan.scale.rows, cout))
    _launch(plan, pixels, averages, _packed(weight, bias), grid, out)
    return DualResTensor(out, grid, plan.scale.block)


def max_pool2d(x: DualResTensor) -> DualResTensor | None:
    """3×3 max pooling of stride 2 and padding 1; None where this way is not open."""
    pixels, grid = x.pixels, x.grid
    plain = pixels.dtype in _HALVES and pixels.is_contiguous() and launches_directly(pixels)
    if not plain or pixels.shape[1] % 8 or _generation(pixels.get_device()) < 8:
        return None
    channels = pixels.shape[1]
    plan = _plan(x.block, grid.n_high, grid.n_blocks, 2, 3, channels, channels)
    averages = _averages(pixels, grid, plan)
    out = pixels.new_empty((plan.scale.rows, channels))
    tensors = (pixels, _table(grid, plan.table), _table(grid, plan.own), out, averages)
    kernel = _pool_kernel(pixels.dtype, pixels.get_device(), plan.source, plan.scale, channels)
    kernel.launch(pixels.device, *(t.data_ptr() for t in tensors))
    return DualResTensor(out, grid, plan.scale.block)


def _applies(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    cout, cin = weight.shape[:2]
    if weight.dtype != pixels.dtype or cin % 64 or cout % 64 or not pixels.is_contiguous():
        return False
    if not launches_directly(pixels) or _generation(pixels.get_device()) != 9:
        return False
    if weight.is_inference() or (bias is not None and bias.is_inference()):
        return False  # inference tensors do not count their changes
    if not torch.is_grad_enabled():
        return True
    return not weight.requires_grad and (bias is None or not bias.requires_grad)


@functools.lru_cache(maxsize=4096)
def _plan(
    block: int, n_high: int, n_blocks: int, stride: int, kernel: int, cin: int, cout: int
) -> _Plan:
    source = Scale.of(block, n_high, n_blocks)
    scale = Scale.of(block // stride, n_high, n_blocks)
    wide = kernel > 1
    tile = choose_tile(scale.rows, cout, kernel * kernel * cin // 64)
    return _Plan(
        source,
        scale,
        own=(scale.block, 1, True),
        table=(block, stride, not wide),
        here=(block, 1, True) if wide else None,
        averages=source.zero - source.rows + 1,
        channels=(cin, 0, cout),
        fused=Fused(taps=kernel * kernel, averages=False, separate=wide),
        tile=Tile(tile.rows, tile.columns, tile.stages, tile.resident, tile.producers, 1),
    )


def _launch(
    plan: _Plan,
    pixels: Tensor,
    averages: Tensor | None,
    packed: _Packed,
    grid: BlockGrid,
    out: Tensor,
) -> None:
    """The Hopper convolution; all that this module knows of it."""
    convolve(
        plan.fused,
        plan.tile,
        plan.scale,
        pixels,
        packed.matrix,
        packed.shift,
        out,
        plan.channels,
        _table(grid, plan.own),
        _table(grid, plan.table),
        averages=averages,
        stored=plan.source.rows,
        follows=False,  # its tables may be made by the launch ahead
    )


def _averages(pixels: Tensor, grid: BlockGrid, plan: _Plan) -> Tensor:
    """2×2 averages of the high blocks and a row of zeros: what follows in an extended buffer."""
    channels = pixels.shape[1]
    out = pixels.new_empty((plan.averages, channels))
    kernel = _averages_kernel(pixels.dtype, pixels.get_device(), plan.source.high_rows, channels)
    own = _table(grid, plan.here)
    kernel.launch(pixels.device, pixels.data_ptr(), own.data_ptr(), out.data_ptr())
    return out


def _table(grid: BlockGrid, key: _Key) -> Tensor:
    """A table of the grid, kept with the grid."""
    found = grid.tables.get(key)
    return _make_tables(grid, key) if found is None else found


def _make_tables(grid: BlockGrid, key: _Key) -> Tensor:
    """This table, and in the same launch those that grids like this one asked for next."""
    start = (next(iter(grid.tables), key), grid.shape)
    wanted = _WANTED.setdefault(start, [])
    if key not in wanted:
        if len(wanted) >= _MOST_KEYS:
            wanted.clear()
        wanted.append(key)
    if len(_WANTED) > _MOST_KEYS:
        _WANTED.clear()
    keys = [TableKey(*k) for k in {key, *wanted} if k not in grid.tables]
    made = build_tables(grid.slot, grid.cells, grid.n_high, keys)
    grid.tables[key] = made.pop(TableKey(*key))
    grid.tables.update({(k.block, k.stride, k.centre): table for k, table in made.items()})
    return grid.tables[key]


def _packed(weight: Tensor, bias: Tensor | None) -> _Packed:
    versions = (weight.data_ptr(), weight._version, weight.dtype)
    if bias is not None:
        versions += (bias.data_ptr(), bias._version, bias.dtype)
    found = _PACKED.get(id(weight))
    if found is None or found.weight() is not weight or found.versions != versions:
        found = _PACKED[id(weight)] = _pack(weight, bias, versions)
    return found


def _pack(weight: Tensor, bias: Tensor | None, versions: tuple) -> _Packed:
    cout = weight.shape[0]
    matrix = weight.detach().permute(2, 3, 1, 0).reshape(-1, cout)
    packed = pack_weights(matrix, weight.shape[2] ** 2)
    shift = torch.zeros(packed.shape[1], device=weight.device)
    if bias is not None:
        shift[:cout] = bias.detach()
    name = id(weight)

    def forget(reference: weakref.ref) -> None:
        if name in _PACKED and _PACKED[name].weight is reference:
            del _PACKED[name]

    return _Packed(weakref.ref(weight, forget), versions, packed, shift)


@functools.lru_cache(maxsize=1024)
def _averages_kernel(dtype: torch.dtype, device: int, high_rows: int, channels: int) -> Kernel:
    blocks = -(-(high_rows // 4 + 1) * channels // 8 // 256)
    constants = struct.pack("2i", high_rows, channels)
    return _pool_file("averages", dtype, device, blocks, constants, 3)


@functools.lru_cache(maxsize=1024)
def _pool_kernel(
    dtype: torch.dtype, device: int, source: Scale, scale: Scale, channels: int
) -> Kernel:
    sizes = (source.zero, scale.rows, scale.high_rows, scale.block, scale.pitch, channels)
    constants = struct.pack("8i", *sizes, source.rows, 0)
    blocks = -(-(-(-scale.rows // 4) * channels // 8) // 256)
    return _pool_file("max_pool", dtype, device, blocks, constants, 5, SEPARATE=1)


def _pool_file(
    name: str,
    dtype: torch.dtype,
    device: int,
    blocks: int,
    constants: bytes,
    pointers: int,
    **more: int,
) -> Kernel:
    settings: dict[str, Any] = {"DTYPE": dtype == torch.bfloat16, "VECTOR": 8, "INDEX64": 0, **more}
    options = ("-std=c++17", *(f"-DSB_{name}={int(value)}" for name, value in settings.items()))
    return prepare("pool.cu", name, options, device, blocks, 256, constants, pointers)


@functools.cache
def _generation(device: int) -> int:
    """8 for Ampere and Ada, 9 for Hopper, ..."""
    return torch.cuda.get_device_capability(device)[0]
