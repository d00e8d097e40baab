"""The patch convolution, against float32 rules on block tensors.

On Hopper, and in bfloat16 with Hopper's instructions played on the CPU.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from extended import NAN, REPEATS, check_equal, check_output, edges_of, extended_input, grid_of
from hopper_on_cpu import PROCESSORS, hopper_or_cpu  # noqa: F401
from test_fast_layouts import plain_matrix

from segblocks import DualResTensor
from segblocks.fast import patches
from segblocks.fast.tables import Scale, TableKey, build_tables
from segblocks.fast.tilings import SHARED, STAGE_BYTES, STREAMED, Cut, Division, Tiling, divide
from segblocks.ops.cuda.module import multiprocessors


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@dataclass(frozen=True)
class Case:
    """A convolution: its grid, channels, what is added, and how its work is shared."""

    block: int
    cin: int = 64
    cout: int = 64
    grid: tuple[int, int, int] = (1, 3, 4)
    high: int = 5
    extra: int = 0  # channels of a second input
    extra_stride: int = 1
    residual: bool = False
    post: bool = False
    relu: bool = True
    dtype: torch.dtype = torch.float16
    lanes: int = 0  # thread blocks for each slice and part; 0: as planned
    streamed: bool = False
    tiles: int = 0  # of patches, at most so many; 0: of 128 pixels

    def divide(self, scale: Scale, processors: int) -> Division:
        second = 64 if self.residual else self.extra
        channels = (self.cin, second, self.cout)
        tiling = Tiling.of_patches(scale, self.tiles) if self.tiles else Tiling.of(scale)
        d = divide(tiling, channels, processors)
        if self.streamed:
            chunks, stages = d.chunk_of[-1], STREAMED
            ring = min(8, (SHARED - stages * STAGE_BYTES) // d.tiling.slot)
            lanes = min(64 // d.slices, d.tiling.tiles)
            d = Division(d.tiling, (0, chunks), False, stages, ring, lanes, d.slices)
        return replace(d, lanes=min(self.lanes, d.tiling.tiles)) if self.lanes else d


CASES = {
    # Kinds of tiles: of high and of low blocks.
    "tall, tall": Case(32),
    "tall, pair": Case(16, 128, 128),
    "pair, woven": Case(8, 128, 128),
    "rows of 4": Case(4),
    "pair, rows": Case(24),
    "rows": Case(2),
    "none high": Case(16, high=0),
    "none high of 8": Case(8, high=0),
    "one high": Case(16, high=1),
    "all high": Case(16, high=12),
    "all high of 8": Case(8, high=12),
    "one block": Case(16, grid=(1, 1, 1), high=1),
    # What is added.
    "no relu": Case(16, relu=False, residual=True),
    "residual": Case(16, 128, 128, (2, 3, 4), 9, residual=True),
    "residual of 32": Case(32, residual=True),
    "residual, woven": Case(8, 128, 192, residual=True),
    "residual, rows": Case(4, 64, 128, residual=True),
    "post": Case(16, 128, 128, (2, 3, 4), 9, residual=True, post=True),
    "post alone": Case(8, 64, 128, post=True, relu=False),
    "extra": Case(16, 128, 128, extra=64),
    "extra of stride 2": Case(16, 128, 128, (2, 3, 4), 9, extra=64, extra_stride=2),
    "extra of stride 2, woven": Case(8, 64, 128, extra=128, extra_stride=2),
    "extra of stride 2, rows": Case(4, 64, 64, extra=64, extra_stride=2),
    "extra of stride 2, 24": Case(24, extra=64, extra_stride=2),
    # The inner dimension in parts.
    "parts": Case(8, 256, 256),
    "parts, residual": Case(8, 256, 256, residual=True),
    "parts, extra": Case(8, 256, 256, extra=128, extra_stride=2),
    "many parts": Case(8, 512, 64, high=6),
    "many, streamed": Case(8, 512, 512, high=6),
    "many parts, post": Case(4, 512, 512, extra=256, extra_stride=2, post=True),
    "streamed, one thread block each": Case(8, 256, 64, (1, 8, 16), 51, lanes=1),
    # Weights that stream by.
    "streamed": Case(16, 128, 128, (2, 4, 8), 23, residual=True, post=True, streamed=True),
    "streamed, pair": Case(8, 256, 256, (2, 4, 8), 23, post=True, streamed=True),
    "streamed, extra": Case(
        8, 256, 256, (2, 4, 8), 23, extra=128, extra_stride=2, post=True, streamed=True
    ),
    "streamed, rows": Case(4, 512, 128, (2, 4, 8), 23, residual=True, post=True, streamed=True),
    "streamed, odd": Case(16, 256, 64, high=5, post=True, streamed=True, lanes=3),
    "streamed, too long for parts": Case(8, 1152, 64, post=True, residual=True),
    "streamed, one thread block": Case(8, 256, 64, high=7, post=True, streamed=True, lanes=1),
    # Many tiles for each thread block, an odd number among them.
    "many tiles of 32": Case(32, 64, 64, (1, 8, 16), 51),
    "many tiles of 16": Case(16, 128, 128, (4, 8, 16), 205, residual=True),
    "many tiles of 8": Case(8, 128, 128, (4, 8, 16), 205),
    "many tiles, streamed": Case(8, 256, 256, (4, 8, 16), 205, post=True),
    "one thread block": Case(16, 64, 64, high=5, lanes=1),
    "one thread block, slot by slot": Case(32, 128, 64, residual=True, lanes=1),
    "streamed, slot by slot": Case(32, 384, 64, high=6, streamed=True, lanes=3),
    "one thread block, pair": Case(8, 64, 64, high=7, lanes=1),
    "one thread block, rows": Case(24, 64, 64, high=1, lanes=1),
    "three thread blocks": Case(16, 128, 64, high=6, lanes=3, residual=True),
    "three thread blocks, woven": Case(8, 64, 64, (1, 4, 8), 11, lanes=3),
    "three thread blocks, all woven": Case(8, 64, 64, (1, 8, 8), 0, lanes=3),
    "woven, no relu, post": Case(8, 192, 64, (1, 8, 8), 9, residual=True, relu=False, post=True),
    # Tiles of patches, three in some.
    "patches of both": Case(16, 128, 128, tiles=99),
    "patches of both, of 32": Case(32, 64, 64, residual=True, tiles=99, lanes=5),
    "triples of both": Case(16, 128, 128, tiles=10, lanes=3),
    "triples alone": Case(16, 64, 64, tiles=9, residual=True),
    "triples of 32": Case(32, 64, 64, tiles=50, residual=True, post=True),
    "triples of 24": Case(24, 64, 64, tiles=28, lanes=4),
    "triples, woven": Case(8, 128, 128, tiles=3),
    "triples, all high": Case(16, 128, 128, high=12, tiles=20, lanes=3),
    "triples, none high": Case(16, 64, 64, high=0, tiles=5, relu=False),
    "triples, extra": Case(16, 128, 128, (2, 3, 4), 9, extra=64, extra_stride=2, tiles=20, lanes=7),
    "triples, woven, extra": Case(8, 64, 128, high=8, extra=128, extra_stride=2, tiles=4, lanes=2),
    "triples, one thread block": Case(16, 64, 64, tiles=10, lanes=1),
    "triples, streamed": Case(
        16, 128, 128, (1, 4, 8), 13, tiles=30, lanes=4, streamed=True, post=True
    ),
    "triples, woven, streamed": Case(
        8, 256, 64, (1, 4, 8), 13, tiles=8, streamed=True, residual=True
    ),
    "triples, parts": Case(8, 512, 64, high=6, tiles=3, residual=True),
    "triples, two parts": Case(16, 256, 64, (1, 1, 2), 1, tiles=2),
    # bfloat16.
    "bf16": Case(16, 128, 128, residual=True, dtype=torch.bfloat16),
    "bf16, parts": Case(8, 256, 256, dtype=torch.bfloat16),
    "bf16, rows": Case(4, extra=64, extra_stride=2, dtype=torch.bfloat16),
    "bf16, streamed": Case(8, 256, 256, (4, 8, 16), 205, dtype=torch.bfloat16),
}


class Convolution:
    """Random inputs and parameters of a case, and what it should make of them."""

    def __init__(self, case: Case, device: str):
        if device == "cpu":
            case = replace(case, dtype=torch.bfloat16)
        self.case, self.grid = case, grid_of(case.grid, case.high, device)
        self.device = device
        grid, block, dtype = self.grid, case.block, case.dtype
        n_blocks = grid.mask.numel()
        self.scale = Scale.of(block, case.high, n_blocks)
        self.division = case.divide(
            self.scale, PROCESSORS if device == "cpu" else multiprocessors(0)
        )
        keys = [TableKey(block), TableKey(block, centre=True)]
        found = build_tables(grid.slot, grid.cells, case.high, keys)
        self.table, self.own = found[keys[0]], found[keys[1]][0]
        cut = Cut(block, self.division.tiling)
        tiles = patches.build_patches(grid.slot, grid.cells, case.high, [cut])
        self.patches = tiles.get(cut)
        cin, cout = case.cin, case.cout
        self.x = extended_input(grid, self.scale, cin, dtype)
        weight = torch.randn(cout, cin, 3, 3) / (9 * cin) ** 0.5
        self.weight = weight.to(device, dtype)
        packed = [patches.pack_patch_weights(plain_matrix(weight).to(dtype), 9)]
        self.channels, self.second = (cin, case.extra, cout), None
        if case.extra:
            scale2 = Scale.of(block * case.extra_stride, case.high, n_blocks)
            self.second = extended_input(grid, scale2, case.extra, dtype)
            self.second_rows = scale2.rows
            matrix = torch.randn(case.extra, cout) / case.extra**0.5
            self.second_weight = matrix.t().to(device, dtype)[:, :, None, None]
            packed.append(patches.pack_patch_weights(matrix.to(dtype)))
        elif case.residual:
            self.second = extended_input(grid, self.scale, cout, dtype)
            packed.append(patches.pack_patch_weights(patches.identity(cout).to(dtype)))
            self.channels = (cin, 64, cout)
        self.packed = torch.cat(packed).to(device)
        self.bias = torch.randn(self.packed.shape[1], device=device)
        self.post = torch.randn(2, self.packed.shape[1], device=device) if case.post else None
        self.count = torch.zeros(4096, dtype=torch.int32, device=device)

    def run(self) -> torch.Tensor:
        case = self.case
        shape = (self.scale.zero + 1, case.cout)
        out = torch.full(shape, NAN, dtype=case.dtype, device=self.device)
        more = {}
        if case.extra:
            more = {"x2": self.second, "stride2": case.extra_stride}
        elif case.residual:
            more = {"x2": self.second, "step2": 64}
        patches.convolve_patches(
            self.division,
            self.scale,
            self.x,
            self.packed,
            self.bias,
            out,
            self.channels,
            self.own,
            self.table,
            self.patches,
            post=self.post,
            relu=case.relu,
            count=self.count,
            **more,
        )
        return out

    def expected(self) -> torch.Tensor:
        case, cout = self.case, self.case.cout
        x = DualResTensor(self.x[: self.scale.rows].float(), self.grid, case.block)
        y = F.conv2d(x, self.weight.float(), self.bias[:cout], padding=1).pixels
        if case.extra:
            pixels, stride = self.second[: self.second_rows].float(), case.extra_stride
            second = DualResTensor(pixels, self.grid, case.block * stride)
            y = y + F.conv2d(second, self.second_weight.float(), None, stride).pixels
        elif case.residual:
            y = y + self.second[: self.scale.rows].float()
        if case.relu:
            y = y.relu()
        return y if self.post is None else (y * self.post[0, :cout] + self.post[1, :cout]).relu()


@pytest.mark.parametrize("name", CASES)
def test_convolutions(name, device):
    convolution = Convolution(CASES[name], device)
    results = [convolution.run() for _ in range(REPEATS[device])]
    check_output(results[0], convolution.expected(), convolution.scale)
    check_equal(results)
    assert not convolution.count.any(), "counters are left at zero"


def test_cases_cover_every_way_of_sharing_the_work():
    ways, triples = set(), set()
    for case in CASES.values():
        n_blocks = case.grid[0] * case.grid[1] * case.grid[2]
        d = case.divide(Scale.of(case.block, case.high, n_blocks), 132)
        tiles, low = d.tiling.high_tiles, d.tiling.tiles - d.tiling.high_tiles
        way = "streamed" if not d.resident else "parts" if d.parts > 1 else "whole"
        ways.add(way)
        triples.add(way if d.tiling.triples else "")
        ways.add("three parts" if d.parts > 2 else "")
        if tiles > 2 * d.lanes and low > 2 * d.lanes:
            ways.add("odd" if -(-tiles // d.lanes) % 2 else "even")
    assert ways - {""} == {"streamed", "parts", "three parts", "whole", "odd", "even"}
    assert triples == {"", "streamed", "parts", "whole"}


def test_averages_inside_a_block_are_left_alone(device):
    """Nobody reads them, so they cost no write."""
    convolution = Convolution(Case(16, high=5), device)
    averages = convolution.run()[convolution.scale.rows : convolution.scale.zero]
    _, inside = edges_of(averages, 16)
    assert inside.numel() > 0
    assert inside.isnan().all()
