"""How the convolution that goes row by row shares its work; no GPU needed: what the kernel does for
it runs on the CPU (`emulation.py`)."""

import ctypes
import struct

import emulation
import pytest
import torch

from segblocks.fast.row_tiles import Division, Tile, divide, estimate
from segblocks.fast.tables import Scale
from segblocks.ops.cuda import module

COUNTERS = 4096
GUARD = 64  # values behind `work` that nobody may touch


@pytest.mark.parametrize("processors", [1, 3, 132])
@pytest.mark.parametrize("columns", [24, 64, 128, 512])
@pytest.mark.parametrize("steps", [1, 9, 18, 36, 72, 80])
@pytest.mark.parametrize("rows", [1, 96, 4096, 4496, 20000, 400000])
def test_divisions_fit_the_machine(rows, columns, steps, processors):
    d = divide(rows, columns, steps, processors)
    tile, slots = d.tile, processors * d.tile.resident
    assert tile.shared * tile.resident <= 227 << 10, "shared memory of a multiprocessor"
    assert d.tiles == tile.count(rows, columns)
    assert d.tiles * tile.rows * tile.columns >= rows * columns
    split_tiles = d.tiles - d.whole
    assert (split_tiles > 0) == (d.split > 1)
    assert d.blocks == d.whole + split_tiles * d.split
    if split_tiles:
        assert d.whole % slots == 0, "whole rounds"
        assert split_tiles * d.split <= slots, "one more round"
        assert d.split * 3 <= steps, "every part is worth its while"
        assert split_tiles <= COUNTERS
        assert d.work == split_tiles * d.split * tile.rows * tile.columns
    else:
        assert d.work == 0
    plain = divide(rows, columns, steps, processors, may_split=False)
    assert (plain.whole, plain.blocks, plain.work) == (plain.tiles, plain.tiles, 0)
    assert estimate(d, steps, processors) <= estimate(plain, steps, processors)


@pytest.mark.parametrize(
    ("batch", "block", "columns", "steps", "rows", "whole", "split_tiles"),
    [
        (1, 4, 512, 72, 64, 0, 72),  # all tiles
        (4, 4, 512, 72, 64, 264, 20),
        (16, 4, 512, 72, 128, 528, 36),
        (1, 16, 128, 9, 128, 141, 0),  # too short to split, but wide tiles are one round
        (1, 16, 128, 2, 128, 141, 0),
        (1, 32, 128, 2, 128, 562, 0),
        (1, 4, 512, 1, 64, 72, 0),
    ],
)
def test_layers_of_swiftnet(batch, block, columns, steps, rows, whole, split_tiles):
    """With 51 of 128 blocks high, on the 132 multiprocessors of an H200."""
    scale = Scale.of(block, 51 * batch, 128 * batch)
    d = divide(scale.rows, columns, steps, 132)
    assert (d.tile.rows, d.whole, d.tiles - d.whole) == (rows, whole, split_tiles)


# -- the kernel's own code -------------------------------------------------------------------------

ARGUMENTS = """
constexpr int BM = SB_BM, BN = SB_BN, PITCH = BN + 8;
constexpr bool HALVES = BM == 64;
struct Arguments {
    float* work;
    int* count;
    float* out;
    int cout, whole, split, steps;
};
inline void sync_threads(int, int) { __syncthreads(); }
"""
# Step k adds 2^k times a small number to each value, so that a sum tells which steps are in it.
SHARING = """
inline int value(int item) { return 1 + item % 13; }
extern "C" void block_shares(const Arguments& p) {
    alignas(16) static float staged[128 * PITCH];
    static int arrived;
    Share share = share_of(p, p.steps);
    int thread = threadIdx.x, group = thread / 128, row = BM == 64 ? 0 : group * 64;
    for (int item = thread; item < 128 * BN; item += 256) {
        float sum = 0;
        for (int k = share.first; k < share.last; k++)
            if (BM == 128 || (k - share.first) % 2 == item / (64 * BN))
                sum += (1 << k) * value(item % (BM * BN));
        staged[item / BN * PITCH + item % BN] = sum;
    }
    __syncthreads();
    constexpr int READERS = BM == 64 ? 256 : 128;
    bool halves = BM == 64;
    if (share.shared >= 0) {
        if (!add_parts<READERS>(p, share, staged + row * PITCH, row, thread % READERS, &arrived))
            return;
        halves = false;
        __syncthreads();
    }
    int tile = share.tile_m * ((p.cout + BN - 1) / BN) + share.tile_n;
    for (int item = thread; item < BM * BN; item += 256) {
        float sum = staged[item / BN * PITCH + item % BN];
        if (halves) sum += staged[(64 + item / BN) * PITCH + item % BN];
        float& to = p.out[(long long)tile * BM * BN + item];
        to = to == -1 ? sum : -2;  // stored once
    }
    __syncthreads();
}
"""


@pytest.mark.parametrize("tile", [Tile(64, 128), Tile(128, 128), Tile(128, 64)], ids=str)
@pytest.mark.parametrize(
    ("tiles", "whole", "split", "steps"),
    [
        (3, 3, 1, 4),
        (4, 2, 2, 9),
        (3, 0, 3, 9),
        (5, 4, 4, 9),  # parts of different lengths
        (4, 3, 9, 9),  # parts of one step
        (2, 0, 12, 18),
    ],
)
def test_every_step_of_every_tile_is_added_once(tile, tiles, whole, split, steps, monkeypatch):
    division = Division(tile, tiles, whole, split)
    text = f"#define INLINE static inline\n{ARGUMENTS}{module.source('shares.cuh')}{SHARING}"
    monkeypatch.setattr(module, "source", lambda file: text)
    options = (f"-DSB_BM={tile.rows}", f"-DSB_BN={tile.columns}")
    library = emulation._library("shares.cuh", "block_shares", options)
    work = torch.full((division.work + GUARD,), torch.nan)
    count = torch.zeros(max(1, tiles - whole), dtype=torch.int32)
    out = torch.full((tiles, tile.rows * tile.columns), -1.0)
    pointers = struct.pack("3Q", *(t.data_ptr() for t in (work, count, out)))
    parameters = pointers + struct.pack("4i", tile.columns, whole, split, steps)
    assert len(parameters) == library.size()
    library.run(parameters, *map(ctypes.c_uint, (division.blocks, 1, 256)))
    value = 1 + torch.arange(tile.rows * tile.columns) % 13
    assert torch.equal(out, (2**steps - 1) * value.float().expand_as(out))
    assert not count.any(), "counters are left at zero"
    assert work[division.work :].isnan().all()
    assert not work[: division.work].isnan().any()
