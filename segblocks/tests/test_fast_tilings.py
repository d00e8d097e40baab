"""How the patch convolution cuts its work, and what it is given; no GPU needed."""

from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, distance, make_grid, make_image
from definition import slow_blocks
from neighbours import extended
from patches_by_hand import (
    IN_TURN,
    LOW_KINDS,
    TileByHand,
    kinds_of,
    tiles_by_hand,
    tiles_of_patches_by_hand,
    upper_lines,
)
from test_fast_layouts import plain_matrix, unpack, unpack_turned

from segblocks import to_blocks
from segblocks.fast import patches, tilings
from segblocks.fast.tables import Scale
from segblocks.fast.tilings import Division, Tiling, divide, estimate, plan

SHARED = 227 << 10  # bytes of shared memory that a thread block of Hopper can have
STATIC = 1024  # of them for barriers
STAGE = 64 * 64 * 2  # bytes of one tap of 64 input and 64 output channels
MAX_STAGES = 32  # barriers of the kernel
NUMBER = {"tall": 0, "pair": 1, "triple": 1, "woven": 2, "rows": 3}  # as in patch_tiles.cuh


def kind_of(side: int, high: bool) -> int:
    return NUMBER[kinds_of(high).get(side, "rows")]


# -- tilings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("block", [8, 16, 24, 32])
def test_tilings_have_a_place_for_every_pixel(block, grid):
    mask = make_grid(grid)
    scale = Scale.of(block, int(mask.sum()), mask.numel())
    tiling = Tiling.of(scale)
    assert tiling.tiles * 128 >= scale.rows
    if scale.high_rows:
        assert tiling.high_kind == kind_of(block, True)
        assert tiling.high_tiles == len(tiles_by_hand(mask, block, True))
        assert tiling.first_row == scale.high_rows
        assert tiling.has_patches
    if scale.rows > scale.high_rows:
        assert tiling.low_kind == kind_of(block // 2, False)
        low_rows = scale.rows - scale.high_rows
        assert tiling.tiles - tiling.high_tiles == -(-low_rows // 128)
        if block // 2 in LOW_KINDS:
            assert tiling.tiles - tiling.high_tiles == len(tiles_by_hand(mask, block, False))


@pytest.mark.parametrize("tiles", range(1, 60))
@pytest.mark.parametrize("n_high", [0, 1, 5, 12])
@pytest.mark.parametrize("block", [8, 16, 24, 32])
def test_tiles_of_patches_are_as_few_as_asked_for(block, n_high, tiles):
    scale = Scale.of(block, n_high, 12)
    tiling = Tiling.of_patches(scale, tiles)
    rows = scale.rows if block % 16 == 0 else scale.high_rows
    low = -(-(scale.rows - rows) // 128)
    fewest = -(-rows // 192) + low
    if tiling is None:  # too few, or as they are anyway
        assert tiles < fewest or (block % 16 and tiles >= -(-rows // 128) + low)
        return
    assert fewest <= tiling.tiles <= tiles
    assert tiling.tiles - tiling.high_tiles == low
    pairs = tiling.high_tiles - tiling.triples
    assert pairs >= 0
    places = 192 * tiling.triples + 128 * pairs
    assert rows <= places < rows + 128, "and none more than they need"
    assert tiling.triples == 0 or places == rows
    assert tiling.triples > 0 or block % 16 == 0


def test_no_tiles_of_patches_where_blocks_hold_none():
    for block in (2, 4, 6, 12, 20):
        assert not any(Tiling.of_patches(Scale.of(block, 5, 12), n) for n in range(100))


@pytest.mark.parametrize("n_high", [0, 5, 12])
@pytest.mark.parametrize("block", [2, 4, 6, 12])
def test_blocks_that_are_no_patches_are_one_range_of_rows(block, n_high):
    scale = Scale.of(block, n_high, 12)
    tiling = Tiling.of(scale)
    assert not tiling.has_patches
    assert (tiling.high_tiles, tiling.first_row) == (0, 0)
    assert tiling.tiles * 128 == scale.pitch


@pytest.mark.parametrize(
    ("kind", "pixels"),
    [
        ("tall", 18 * 10),
        ("pair", 20 * 10),
        ("triple", 30 * 10),
        ("woven", 6 * 6 * 8),
        ("rows", 128),
    ],
)
def test_planes_hold_a_tile_and_fall_into_different_banks(kind, pixels):
    number = NUMBER[kind]
    tiling = Tiling(1, 1, number, number, 0, int(kind == "triple"))
    assert tiling.plane >= 16 * pixels
    eight = {tiling.plane * i % 128 for i in range(8)}
    assert len(eight) == 8, "16 bytes of eight planes are written at once"
    assert tiling.slot % 16 == 0


# -- sharing the work ------------------------------------------------------------------------------

CHANNELS = [
    (64, 0, 64),
    (64, 64, 64),
    (128, 0, 128),
    (128, 64, 128),
    (256, 0, 256),
    (256, 128, 256),
    (512, 0, 512),
    (512, 256, 512),
    (1024, 0, 64),
    (2048, 0, 64),
    (2048, 512, 256),
]


@pytest.mark.parametrize("processors", [78, 114, 132])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("n_blocks", [1, 6, 128, 2048])
@pytest.mark.parametrize("block", [2, 4, 8, 16, 24, 32])
def test_work_is_shared_among_thread_blocks(block, n_blocks, channels, processors):
    scale = Scale.of(block, n_blocks * 2 // 5, n_blocks)
    check_division(divide(Tiling.of(scale), channels, processors), channels, processors)
    check_division(plan(scale, channels, processors), channels, processors)


def check_division(d: Division, channels: tuple[int, int, int], processors: int) -> None:
    (cin, cin2, cout), tiling = channels, d.tiling
    taps = [9] * (cin // 64) + [1] * (cin2 // 64)
    assert d.chunk_of[0] == 0
    assert d.chunk_of[-1] == len(taps), "every chunk is in a part"
    assert all(a < b for a, b in pairwise(d.chunk_of)), "and in one part alone"
    assert d.parts <= 8
    assert d.slices * 64 == cout
    needed = max(sum(taps[a:b]) for a, b in pairwise(d.chunk_of))
    assert d.stages <= MAX_STAGES
    if d.resident:
        assert d.stages == needed
    else:
        assert d.parts == 1, "what streams by is not shared"
        assert 2 <= d.stages < needed
    assert 3 <= d.ring <= 8
    assert d.shared == d.stages * STAGE + d.ring * tiling.slot + 1024
    assert d.shared + STATIC <= SHARED
    assert 1 <= d.lanes <= tiling.tiles
    assert d.blocks == d.lanes * d.slices * d.parts
    if d.slices * d.parts <= processors:
        assert d.blocks <= processors, "one thread block a multiprocessor, all at once"
    if d.parts > 1:
        assert tiling.tiles * d.slices * d.parts <= processors, "no thread block has two tiles"
        assert tiling.tiles * d.slices * 2 <= 4096, "counters"


@pytest.mark.parametrize(
    ("n_blocks", "channels", "way"),
    [
        (6, (64, 0, 64), (True, False)),
        (2048, (64, 64, 64), (True, False)),
        (6, (256, 0, 256), (True, True)),
        (2048, (256, 0, 256), (False, False)),
        (6, (2048, 0, 64), (False, False)),  # too long for parts
    ],
    ids=str,
)
def test_weights_stay_are_shared_or_stream(n_blocks, channels, way):
    d = divide(Tiling.of(Scale.of(16, n_blocks // 2, n_blocks)), channels, 132)
    assert (d.resident, d.parts > 1) == way


@pytest.mark.parametrize(
    ("block", "channels", "n_high", "tiles", "triples"),
    [
        (8, (256, 64, 256), 51, 33, 5),  # one for each of 33, not 36
        (8, (256, 64, 256), 26, 26, 0),  # fewer than 33
        (8, (256, 64, 256), 128, 64, 0),  # even as they are
        (16, (128, 64, 128), 51, 132, 17),  # of both resolutions, two for each of 66, not 141
        (16, (128, 64, 128), 26, 103, 0),  # of both resolutions
        (16, (128, 0, 128), 51, 141, 0),  # weights stay
    ],
)
def test_the_last_few_tiles_take_no_round_of_their_own(block, channels, n_high, tiles, triples):
    scale = Scale.of(block, n_high, 128)
    d = plan(scale, channels, 132)
    assert (d.tiling.tiles, d.tiling.triples) == (tiles, triples)
    as_they_are = divide(Tiling.of(scale), channels, 132)
    assert d == as_they_are or estimate(d, channels) < 0.97 * estimate(as_they_are, channels)


def parts_filled_one_by_one(taps: list[int], most: int) -> int:
    parts, filled = 1, 0
    for count in taps:
        if filled + count > most:
            parts, filled = parts + 1, 0
        filled += count
    return parts


@pytest.mark.parametrize(
    "taps",
    [[9], [9] * 4, [9] * 8, [9] * 8 + [1] * 4, [9] * 2 + [1], [9, *[1] * 30], [9] * 5 + [1] * 7],
    ids=str,
)
@pytest.mark.parametrize("most", [9, 12, 18, 22])
def test_parts_are_few_and_nearly_the_same(taps, most):
    fewest = parts_filled_one_by_one(taps, most)
    if fewest > 8:
        assert tilings._balance(taps, most) is None
        return
    bounds = tilings._balance(taps, most)
    assert (bounds[0], bounds[-1]) == (0, len(taps))
    sizes = [sum(taps[a:b]) for a, b in pairwise(bounds)]
    assert 0 not in sizes
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= max(taps)
    assert fewest <= len(sizes) <= fewest + 1


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cin", "cout", "k"), [(64, 64, 3), (128, 192, 3), (192, 128, 1)])
def test_packed_patch_weights(cin, cout, k):
    weight = torch.randn(cout, cin, k, k)
    packed = patches.pack_patch_weights(plain_matrix(weight), k * k)
    assert packed.shape == (cin // 64 * k * k, -(-cout // 128) * 128, 64)
    assert packed.is_contiguous()
    assert torch.equal(unpack_turned(packed, cin, cout, k * k), weight)
    assert not packed[:, cout:].any(), "channels beyond the last are zero"


def test_threads_end_up_with_channels_side_by_side():
    """The product as the matrix unit hands it out, turned round as the kernel does it."""
    weight, pixels = torch.randn(128, 64).double(), torch.randn(8, 64).double()
    packed = patches.pack_patch_weights(weight.t().contiguous())
    rows = unpack(packed, 64, 128, 1)[:, :, 0, 0]
    product_rows = rows @ pixels.t()  # 128 rows of the matrix unit, eight pixels
    out = torch.full((8, 128), float("nan")).double()
    for base, lane in product(range(0, 128, 16), range(32)):
        r, c = lane // 4, lane % 4
        for upper in (0, 1):  # the two 8×8 matrices, of rows r and r + 8 of the warp's 16
            matrix = product_rows[base + 8 * upper : base + 8 * upper + 8]
            # Before turning, a lane holds pixels 2c and 2c + 1 of this channel: of the bias added.
            channel = base + lane // 8 * 4 + lane // 4 % 2 + 2 * upper
            expected = pixels[2 * c : 2 * c + 2] @ weight[channel]
            assert torch.allclose(matrix[r, 2 * c : 2 * c + 2], expected)
            turned = matrix.t()  # what movmatrix does
            first = base + 4 * c + 2 * upper
            out[r, first : first + 2] = turned[r, 2 * c : 2 * c + 2]
    assert distance(out, pixels @ weight.t()) < 1e-10


@pytest.mark.parametrize("channels", [64, 192])
def test_the_identity_passes_a_residual_on(channels):
    residual, matrix = torch.randn(5, channels), patches.identity(channels)
    assert matrix.shape == (64, channels)
    parts = [residual[:, s : s + 64] @ matrix[:, s : s + 64] for s in range(0, channels, 64)]
    assert torch.equal(torch.cat(parts, 1), residual)


# -- tables of tiles -------------------------------------------------------------------------------


def stored_rows(slow) -> torch.Tensor:
    """(P, C) of the definition's blocks."""
    high, low = slow.stored()
    return torch.cat([block.permute(1, 2, 0).flatten(0, 1) for block in (*high, *low)])


def convolve_tile(tile: TileByHand, rows, weight):
    """(pixels, COUT): nine taps of a tile, each read from the staged pixels at another offset."""
    staged = rows[tile.inputs]
    places = list(product(range(len(tile.outputs) // 8), range(8)))
    return sum(
        staged[[tile.staged_at(line, x, dy, dx) for line, x in places]] @ weight[:, :, dy, dx].t()
        for dy, dx in product(range(3), range(3))
    )


def all_tiles(mask, block: int, triples: int | None) -> list[TileByHand]:
    if triples is not None:
        return tiles_of_patches_by_hand(mask, block, triples)
    sides = {True: block, False: block // 2}
    return [
        tile
        for high in (True, False)
        if sides[high] in kinds_of(high)
        for tile in tiles_by_hand(mask, block, high)
    ]


@pytest.mark.parametrize("triples", [None, 0, 1, 2])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("block", [8, 16, 24, 32])
def test_tables_of_tiles_say_what_a_convolution_reads_and_writes(block, grid, triples):
    """The plain table, which the kernel's is compared with, reproduces the definition."""
    mask = make_grid(grid)
    if triples is not None and (block == 24 or 9 * triples > mask.sum()):
        pytest.skip("no tiles of so many patches")
    image = make_image(mask, 2, block)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    slow = F.conv2d(slow_blocks(image, mask), weight, padding=1)
    expected, rows = stored_rows(slow), extended(to_blocks(image, mask))
    means = extended(F.conv2d(to_blocks(image, mask), weight, padding=1))
    zero = rows.shape[0] - 1
    found, written = torch.full_like(means, float("nan")), []
    for tile in all_tiles(mask, block, triples):
        result = convolve_tile(tile, rows, weight)
        for row, value in zip(tile.outputs, result, strict=True):
            if row != zero:
                found[row] = value
                written.append(row)
        lines = result.view(-1, 8, result.shape[1])
        for n, row in enumerate(tile.averages):
            if row >= 0:
                upper, x = upper_lines(tile.kind)[n // 8 * 2 + n % 2], n % 8 // 2 * 2
                quad = lines[[upper, upper + IN_TURN[tile.kind]], x : x + 2]
                found[row] = quad.mean((0, 1))
                written.append(row)
    assert len(written) == len(set(written)), "no row has two writers"
    high_rows = int(mask.sum()) * block * block
    stored = len(expected) if block // 2 in LOW_KINDS else high_rows
    assert set(range(stored)) <= set(written)
    assert torch.allclose(found[:stored], expected[:stored], rtol=0, atol=1e-10)
    edge = edge_averages(mask, block)
    assert {row for row in written if row >= len(expected)} == set(edge)
    assert torch.allclose(found[edge], means[edge], rtol=0, atol=1e-10)


def edge_averages(mask, block) -> list[int]:
    """Rows of the averages along the edges of the high blocks."""
    half, n_high = block // 2, int(mask.sum())
    first = Scale.of(block, n_high, mask.numel()).rows
    inside = range(1, half - 1)
    return [
        first + (i * half + y) * half + x
        for i, y, x in product(range(n_high), range(half), range(half))
        if y not in inside or x not in inside
    ]
