"""The block operations equal the definition: values for every kind of grid, batch and channels."""

from math import isnan

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, TOLERANCE, buffer, distance, make_grid, make_image, pixels_of, place
from definition import slow_blocks

from segblocks import ops

SHAPES = [(1, 2, 3), (2, 1, 1), (3, 2, 1)]
CHANNELS = [1, 3, 19]
HALVES = [torch.float32, torch.float16, torch.bfloat16]
# left, right, top, bottom
SIDES = [
    (0, 0, 0, 0),
    (1, 1, 1, 1),
    (2, 2, 2, 2),
    (3, 3, 3, 3),
    (1, 0, 0, 2),
    (0, 3, 1, 0),
    (-1, 1, 0, -1),
    (-1, -1, -1, -1),
    (-3, 2, 1, 0),
    (5, 6, 3, 4),
    (9, 0, 0, 9),
    (-2, 5, 7, -2),
]
PADDINGS = [(False, 0.0), (False, -torch.inf), (False, 2.5), (True, 0.0)]


# -- where blocks are stored ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_build_slots(kind, shape):
    mask = make_grid(kind, shape)
    slot, cells = ops.build_slots(mask)
    assert slot.dtype == cells.dtype == torch.int32
    high, low = [], []
    for i, (is_high, rank) in enumerate(zip(mask.flatten().tolist(), slot.flatten().tolist())):
        assert rank == (len(high) if is_high else -1 - len(low))
        (high if is_high else low).append(i)
    assert cells.tolist() == high + low


SCORES = {
    "distinct": [[[3.0, 1.0, 2.0], [0.0, -1.0, 5.0]]],
    "ties go to the first": [[[1.0, 1.0, 1.0], [2.0, 1.0, 2.0]]],
    "infinite": [[[torch.inf, -torch.inf, 0.0], [torch.inf, -torch.inf, 1.0]]],
    "not a number": [[[torch.nan, -torch.inf, 0.0], [torch.nan, 7.0, -torch.inf]]],
    "two images": [[[3.0, 1.0], [2.0, 4.0]], [[-3.0, -1.0], [-2.0, -4.0]]],
}


@pytest.mark.parametrize("name", SCORES)
def test_select_budget_takes_the_highest_scores(name):
    scores = torch.tensor(SCORES[name])
    blocks = scores[0].numel()
    for count in range(blocks + 1):
        chosen = ops.select_budget(scores, count)
        assert chosen.dtype == torch.bool
        assert chosen.shape == scores.shape
        for image, grid in zip(scores.flatten(1).tolist(), chosen.flatten(1).tolist()):
            # NaN below -inf, then by score, then the first in raster order.
            keys = [(not isnan(s), 0 if isnan(s) else s, -i) for i, s in enumerate(image)]
            order = sorted(range(blocks), key=keys.__getitem__, reverse=True)
            assert [i for i in range(blocks) if grid[i]] == sorted(order[:count])


@pytest.mark.parametrize("dtype", HALVES)
def test_select_budget_of_any_float(dtype):
    scores = torch.tensor([[[0.5, 2.0, 1.0]]], dtype=dtype)
    assert ops.select_budget(scores, 2).tolist() == [[[False, True, True]]]


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_split(kind, shape, channels):
    where, mask = place(kind, shape)
    image = make_image(mask, channels, 4)
    expected = pixels_of(slow_blocks(image, mask))
    for layout in (torch.contiguous_format, torch.channels_last):
        given = image.contiguous(memory_format=layout)
        assert distance(ops.split(given, *where, 4), expected) < TOLERANCE
    strided = image.repeat_interleave(2, 3)[..., ::2]
    assert distance(ops.split(strided, *where, 4), expected) < TOLERANCE


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("legacy", [False, True])
def test_combine(kind, shape, channels, legacy):
    where, mask = place(kind, shape)
    pixels, slow = buffer(mask, channels, 4)
    slow.legacy = legacy
    expected = slow.combine()
    assert distance(ops.combine(pixels, *where, 4, legacy), expected) < TOLERANCE
    plain = ops.combine(pixels, *where, 4, legacy, channels_last=False)
    assert distance(plain, expected) < TOLERANCE
    assert plain.is_contiguous()


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("replicate", "fill"), PADDINGS)
@pytest.mark.parametrize("kind", GRIDS)
def test_blockpad(sides, replicate, fill, kind):
    check_blockpad(kind, (2, 2, 3), 3, sides, replicate, fill)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_blockpad_of_any_batch_and_channels(shape, channels):
    for sides in SIDES[1:8]:
        check_blockpad("mixed", shape, channels, sides, False, 0.0)


def check_blockpad(kind, shape, channels, sides, replicate, fill, block=8):
    """Every padded block is a window of the padded dense picture of its resolution."""
    where, mask = place(kind, shape)
    pixels, slow = buffer(mask, channels, block)
    padded = ops.blockpad(pixels, *where, block, *sides, replicate, fill)
    left, right, top, bottom = sides
    margin = 10
    rows = []
    for picture, side, wanted in ((slow.H, block, True), (slow.L, block // 2, False)):
        wide = (margin,) * 4
        around = (
            F.pad(picture, wide, "replicate") if replicate else F.pad(picture, wide, value=fill)
        )
        for n, gy, gx in torch.nonzero(mask == wanted).tolist():
            y, x = margin + gy * side, margin + gx * side
            window = around[n, :, y - top : y + side + bottom, x - left : x + side + right]
            rows.append(window.permute(1, 2, 0).flatten(0, 1))
    assert distance(padded, torch.cat(rows)) < TOLERANCE


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_upsample(kind, shape, scale, legacy):
    where, mask = place(kind, shape)
    pixels, slow = buffer(mask, 3, 4)
    slow.legacy = legacy
    expected = pixels_of(F.interpolate(slow, scale_factor=scale, mode="bilinear"))
    assert distance(ops.upsample(pixels, *where, 4, scale, legacy), expected) < TOLERANCE


def test_smallest_blocks():
    """A low block of a single pixel."""
    where, mask = place()
    pixels, slow = buffer(mask, 3, 2)
    assert distance(ops.combine(pixels, *where, 2), slow.combine()) < TOLERANCE
    check_blockpad("mixed", (2, 2, 3), 3, (3, 1, 2, 3), False, 0.0, block=2)
