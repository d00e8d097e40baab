"""The convolution that goes row by row, against float32 rules on block tensors.

By both kernels on Hopper, and in bfloat16 with their instructions played on the CPU.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from extended import NAN, REPEATS, check_equal, check_output, extended_input, grid_of
from fast_models import is_hopper
from hopper_on_cpu import gpu_or_cpu  # noqa: F401
from test_fast_layouts import plain_matrix

from segblocks import DualResTensor
from segblocks.fast.row_conv import Fused, convolve, pack_weights
from segblocks.fast.row_tiles import ON_HOPPER, Division, Tile, Tiles, divide, on_ampere
from segblocks.fast.tables import Scale, TableKey, build_tables

LOW, HIGH, NARROW = Tile(64, 128, 4, 2, 64), Tile(128, 128, 3, 2, 64), Tile(128, 64, 3, 2, 128)
# Of both kernels; the latter's as on an A100.
GENERATIONS = {"hopper": ON_HOPPER, "ampere": on_ampere(164 << 10)}


@pytest.fixture(autouse=True)
def _float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@dataclass(frozen=True)
class Case:
    """A convolution: its grid, channels, what is done beside it, and how its work is shared."""

    cin: int = 128
    cout: int = 128
    size: int = 3
    stride: int = 1
    block: int = 4  # of the output
    grid: tuple[int, int, int] = (1, 8, 16)
    high: int = 51
    extra: int = 0  # channels of a second input
    residual: bool = False
    enlarged: bool = False
    pre: bool = False
    post: bool = False
    relu: bool = True
    limit: float = math.inf  # of the ReLU
    dtype: torch.dtype = torch.float16
    processors: int = 132
    tile: Tile | None = None  # None: as planned for so many processors
    split_tiles: int = 0  # of `tile`: the last ones
    split: int = 1

    @property
    def steps(self) -> int:
        return self.size**2 * -(-self.cin // 64) + self.extra // 64

    def divide(self, scale: Scale, there: Tiles = ON_HOPPER) -> Division:
        if self.tile is None:
            given = (scale.rows, self.cout, self.steps, self.processors)
            return divide(*given, tiles_there=there)
        tiles = self.tile.count(scale.rows, self.cout)
        sides = (self.tile.rows, self.tile.columns)
        tile = next(t for t in (*there.narrow, *there.wide) if (t.rows, t.columns) == sides)
        return Division(tile, tiles, tiles - self.split_tiles, self.split)


CASES = {  # 1124 rows: 18 tiles of 64, 9 of 128
    "whole, 64": Case(tile=LOW),
    "whole, 128": Case(tile=HIGH),
    "whole, narrow": Case(tile=NARROW, cout=64),
    "whole, as planned": Case(64, residual=True),
    # A round that is left over, as planned.
    "left over": Case(256, 256, processors=8),
    "left over, long": Case(512, 512, processors=34),
    "left over, narrow": Case(256, 64, processors=4),
    "less than a round": Case(512, 512),
    "less than a round, narrow": Case(256, 64),
    "one processor": Case(256, 128, high=128, grid=(1, 8, 17), processors=1),
    # Each tile, with parts of all lengths.
    "64": Case(tile=LOW, split_tiles=5, split=4),
    "128": Case(tile=HIGH, split_tiles=3, split=4),
    "narrow": Case(tile=NARROW, cout=64, split_tiles=3, split=4),
    "64, parts of one step": Case(64, tile=LOW, split_tiles=2, split=9),
    "128, parts of one step": Case(64, tile=HIGH, split_tiles=2, split=9),
    "all tiles": Case(tile=HIGH, split_tiles=9, split=12),
    "first tile": Case(tile=LOW, grid=(1, 2, 2), high=1, split_tiles=1, split=6),
    "half a tile of columns": Case(cout=72, tile=LOW, split_tiles=4, split=3),
    "two tiles of columns": Case(cout=136, tile=HIGH, split_tiles=5, split=3),
    "few columns": Case(cout=24, tile=NARROW, split_tiles=5, split=3),
    "none high": Case(high=0, tile=HIGH, split_tiles=2, split=3),
    "all high": Case(high=128, tile=LOW, split_tiles=7, split=3),
    # Input channels that are no multiple of 64.
    "8 channels": Case(8, 64, tile=NARROW, relu=False),
    "24 channels, 1x1": Case(24, 144, size=1, block=16, limit=0.5),
    "48 channels": Case(48, 48, limit=0.5),
    "144 channels, stride 2": Case(144, 40, stride=2, tile=NARROW, split_tiles=4, split=3),
    "112 channels, before and after": Case(
        112, 48, size=1, tile=NARROW, enlarged=True, pre=True, post=True
    ),
    "1152 and 64 channels": Case(1160, 192, size=1, extra=64, tile=HIGH, split_tiles=9, split=3),
    "bf16, 80 channels": Case(80, 480, size=1, residual=True, dtype=torch.bfloat16),
    # What is done beside it.
    "stride 2": Case(stride=2, tile=LOW, split_tiles=7, split=5),
    "no relu": Case(tile=HIGH, split_tiles=4, split=5, relu=False),
    "residual": Case(tile=HIGH, split_tiles=9, split=5, residual=True),
    "residual, post": Case(tile=LOW, split_tiles=9, split=5, residual=True, post=True),
    "extra": Case(64, extra=128, tile=HIGH, split_tiles=6, split=3),
    "extra, a part of its own": Case(64, extra=128, tile=LOW, split_tiles=6, split=11),
    "enlarged": Case(256, size=1, tile=HIGH, split_tiles=9, split=2, enlarged=True),
    "enlarged, before and after": Case(
        512, size=1, tile=LOW, split_tiles=17, split=3, enlarged=True, pre=True, post=True
    ),
    "bf16": Case(tile=LOW, split_tiles=9, split=6, residual=True, dtype=torch.bfloat16),
    "bf16, left over": Case(512, 512, processors=34, dtype=torch.bfloat16),
}


class Convolution:
    """Random inputs and parameters of a case, and what it should make of them."""

    def __init__(self, case: Case, device: str):
        if device == "cpu":
            case = replace(case, dtype=torch.bfloat16)
        self.case, self.grid = case, grid_of(case.grid, case.high, device)
        self.device = device
        grid, dtype = self.grid, case.dtype
        n_blocks = grid.mask.numel()
        self.scale = Scale.of(case.block, case.high, n_blocks)
        self.source = Scale.of(case.block * case.stride, case.high, n_blocks)
        self.small = Scale.of(case.block // 2, case.high, n_blocks)
        keys = [
            TableKey(case.block, centre=True),
            TableKey(self.source.block, case.stride),
            TableKey(self.small.block),
        ]
        found = build_tables(grid.slot, grid.cells, case.high, keys)
        self.own, self.table, self.up_table = found[keys[0]][0], found[keys[1]], found[keys[2]]
        cin, cout = case.cin, case.cout
        self.x = extended_input(grid, self.source, cin, dtype)
        weight = torch.randn(cout, cin, case.size, case.size) / (case.size**2 * cin) ** 0.5
        self.weight = weight.to(device, dtype)
        filled = F.pad(weight, (0, 0, 0, 0, 0, -cin % 64))
        packed = [pack_weights(plain_matrix(filled).to(dtype), case.size**2)]
        self.second = self.addend = None
        if case.extra:
            self.second = extended_input(grid, self.scale, case.extra, dtype)
            matrix = torch.randn(case.extra, cout) / case.extra**0.5
            self.second_weight = matrix.t().to(device, dtype)[:, :, None, None]
            packed.append(pack_weights(matrix.to(dtype)))
        if case.residual:
            self.addend = extended_input(grid, self.scale, cout, dtype)
        elif case.enlarged:
            self.addend = extended_input(grid, self.small, cout, dtype)
        self.packed = torch.cat(packed).to(device)
        width = self.packed.shape[1]
        self.bias = torch.randn(width, device=device)
        self.pre = torch.randn(2, cin, device=device) if case.pre else None
        self.post = torch.randn(2, width, device=device) if case.post else None
        self.count = torch.zeros(4096, dtype=torch.int32, device=device)

    def run(self, there: Tiles) -> torch.Tensor:
        case = self.case
        shape = (self.scale.zero + 1, case.cout)
        out = torch.full(shape, NAN, dtype=case.dtype, device=self.device)
        convolve(
            Fused(
                taps=case.size**2,
                extra=case.extra > 0,
                add=1 if case.residual else 2 * case.enlarged,
                pre=case.pre,
                post=case.post,
                relu=case.relu,
                limited=case.limit < math.inf,
                ragged=case.cin % 64 > 0,
            ),
            case.divide(self.scale, there),
            self.scale,
            self.x,
            self.packed,
            self.bias,
            out,
            (case.cin, case.extra, case.cout),
            self.own,
            self.own if case.size == 1 else self.table,
            x2=self.second,
            table2=self.own,
            addend=self.addend,
            up_table=self.up_table,
            up_scale=self.small,
            pre=self.pre,
            post=self.post,
            count=self.count,
            limit=case.limit,
        )
        return out

    def expected(self) -> torch.Tensor:
        case, cout = self.case, self.case.cout
        pixels = self.x[: self.source.rows].float()
        if case.pre:  # rounded as the matrix units take it
            pixels = (pixels * self.pre[0] + self.pre[1]).relu().to(case.dtype).float()
        x = DualResTensor(pixels, self.grid, self.source.block)
        weight, padding = self.weight.float(), case.size // 2
        y = F.conv2d(x, weight, self.bias[:cout], case.stride, padding).pixels
        if case.extra:
            second = DualResTensor(self.second[: self.scale.rows].float(), self.grid, case.block)
            y = y + F.conv2d(second, self.second_weight.float()).pixels
        if case.residual:
            y = y + self.addend[: self.scale.rows].float()
        elif case.enlarged:
            small = self.addend[: self.small.rows].float()
            small = DualResTensor(small, self.grid, self.small.block)
            y = y + F.interpolate(small, scale_factor=2, mode="bilinear").pixels
        if case.relu:
            y = y.clamp(0, case.limit)
        return y if self.post is None else (y * self.post[0, :cout] + self.post[1, :cout]).relu()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_convolutions(name, generation, device):
    if device == "cuda" and generation == "hopper" and not is_hopper():
        pytest.skip("this kernel needs compute capability 9.0")
    convolution = Convolution(CASES[name], device)
    results = [convolution.run(GENERATIONS[generation]) for _ in range(REPEATS[device])]
    check_output(results[0], convolution.expected(), convolution.scale)
    check_equal(results)
    assert not convolution.count.any(), "counters are left at zero"


def test_cases_cover_every_way_of_sharing_the_work():
    ways = set()
    for case in CASES.values():
        n_blocks = case.grid[0] * case.grid[1] * case.grid[2]
        d = case.divide(Scale.of(case.block, case.high, n_blocks))
        share = "all" if not d.whole else "some" if d.split > 1 else "none"
        ways.add((d.tile, share, case.tile is None))
    for tile in (LOW, HIGH, NARROW):
        assert {(tile, "none"), (tile, "some")} <= {way[:2] for way in ways}
    assert {share for _, share, planned in ways if planned} == {"all", "some", "none"}
