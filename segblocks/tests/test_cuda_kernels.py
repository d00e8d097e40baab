"""The CUDA kernels equal the PyTorch reference, in every type, layout, grid and padding.

Outputs are written over NaN, so that an element left out shows.
"""

import pytest
import torch
from agreement import GRIDS, make_grid
from kernels import TOLERANCE, buffer, check, picture, place_blocks, random

from segblocks.ops import cuda, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

CHANNELS = [16, 3, 19]
LAYOUTS = ["contiguous", "channels_last", "cropped", "transposed", "broadcast"]
SIDES = [  # left, right, top, bottom
    (0, 0, 0, 0),
    (1, 1, 1, 1),
    (2, 2, 2, 2),
    (3, 3, 3, 3),
    (0, 1, 2, 0),
    (3, 0, 0, 1),
    (-1, 1, 0, -1),
    (-1, -1, -1, -1),
    (-3, 2, 1, 0),
    (9, 17, 5, 0),
    (-2, 25, 30, -1),
]
PADDINGS = [(False, 0.0), (False, -torch.inf), (False, 1.5), (True, 0.0)]
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
KINDS = pytest.mark.parametrize("kind", GRIDS)


@DTYPES
@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split(dtype, kind, layout):
    for channels in CHANNELS:
        for batch, block in ((1, 16), (2, 8), (1, 2)):
            where = place_blocks(kind, batch, block)
            check("split", picture(where, channels, dtype, layout), where)


@DTYPES
@KINDS
@pytest.mark.parametrize("channels_last", [True, False])
def test_split_backward(dtype, kind, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for channels in CHANNELS:
        for batch, block in ((1, 16), (2, 4)):
            where = place_blocks(kind, batch, block)
            image = check("split_backward", buffer(where, channels, dtype), where, channels_last)
            assert image.is_contiguous(memory_format=layout)


@DTYPES
@KINDS
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("channels_last", [True, False])
def test_combine(dtype, kind, legacy, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for channels in CHANNELS:
        for batch, block in ((1, 16), (2, 4), (1, 2), (1, 80)):  # the last in several strips
            where = place_blocks(kind, batch, block)
            pixels = buffer(where, channels, dtype)
            image = check("combine", pixels, where, legacy, channels_last)
            assert image.is_contiguous(memory_format=layout)


@DTYPES
@KINDS
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_combine_backward(dtype, kind, legacy, layout):
    for channels in CHANNELS:
        for batch, block in ((1, 16), (2, 4), (1, 2)):
            where = place_blocks(kind, batch, block)
            check("combine_backward", picture(where, channels, dtype, layout), where, legacy)


@DTYPES
@KINDS
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_blockpad(dtype, kind, sides):
    for channels, batch in ((16, 1), (3, 2)):
        where = place_blocks(kind, batch, 8)
        for replicate, fill in PADDINGS:
            pixels = buffer(where, channels, dtype)
            check("blockpad", pixels, where, *sides, replicate, fill)
        for replicate in (False, True):
            grad = buffer(where, channels, dtype, sides=sides)
            check("blockpad_backward", grad, where, *sides, replicate)


@DTYPES
@KINDS
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_upsample(dtype, kind, legacy, scale):
    for channels, batch, block in ((16, 1, 8), (3, 2, 4), (16, 1, 2)):
        where = place_blocks(kind, batch, block)
        check("upsample", buffer(where, channels, dtype), where, scale, legacy)
        grad = buffer(where, channels, dtype, scale)
        check("upsample_backward", grad, where, scale, legacy)


@KINDS
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (16, 8, 16), (1, 70, 90)])
def test_build_slots(kind, shape):
    grid = make_grid(kind, shape).cuda()
    for given, expected in zip(cuda.build_slots(grid), reference.build_slots(grid)):
        assert given.dtype == torch.int32
        assert torch.equal(given, expected)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 16), (2, 40, 50), (2, 70, 60)])
def test_select_budget(dtype, shape):
    scores = random(*shape, dtype=dtype)
    special = torch.rand(shape, device="cuda")
    spiked = scores.round()
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0, -0.0)):
        spiked[(special > i * 0.1) & (special < i * 0.1 + 0.1)] = value
    cells = shape[1] * shape[2]
    for x in (scores, spiked):
        for count in {0, 1, cells // 3, cells}:
            grid = cuda.select_budget(x, count)
            assert torch.equal(grid, reference.select_budget(x, count))


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 3), (16, 8, 16), (1, 30, 34), (2, 70, 90)])
def test_choose_slots(dtype, shape):
    """With ties, infinities and NaN; small grids in one launch, large ones in two."""
    scores = random(*shape, dtype=dtype)
    scores.view(-1)[::3] = 0
    for i, odd in enumerate((torch.nan, torch.inf, -torch.inf)):
        scores.view(-1)[i::11][1:] = odd
    sampled = random(*shape) > 1
    cells = scores[0].numel()
    for count in {0, 1, cells // 2, cells}:
        grid = reference.select_budget(scores, count)
        for mine, theirs in zip(
            cuda.choose_slots(scores, count), (grid, *reference.build_slots(grid))
        ):
            assert torch.equal(mine, theirs)
    for count in {int(sampled.sum()), min(int(sampled.sum()) + 3, scores.numel()), scores.numel()}:
        ranked = torch.where(sampled, torch.inf, scores).flatten()[None]
        grid = reference.select_budget(ranked, count).view(shape)
        for mine, theirs in zip(
            cuda.choose_slots(scores, count, sampled), (grid, *reference.build_slots(grid))
        ):
            assert torch.equal(mine, theirs)
