"""The launch that a forward pass begins with makes what its parts make one by one."""

import pytest
import torch
from agreement import GRIDS, make_grid
from fast_models import ON_HOPPER

from segblocks import BlockGrid
from segblocks.fast import front, patches, stem, tables
from segblocks.fast.tables import Scale, TableKey
from segblocks.fast.tilings import Cut, Tiling

pytestmark = [*ON_HOPPER, pytest.mark.usefixtures("poisoned_memory")]

BLOCK = 64
KEYS = [TableKey(block, stride) for block in (4, 8, 16, 32) for stride in (1, 2)]
KEYS += [TableKey(block, stride, centre=True) for block in (4, 8, 16, 32, 64) for stride in (1, 2)]


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, "planes"])
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 5, 4)])
def test_as_one_by_one(shape, kind, given):
    """More tables than one launch holds, all that it holds, few, and none."""
    grid = BlockGrid.from_mask(make_grid(kind, shape).cuda())
    where = (grid.slot, grid.cells, grid.n_high)
    n, rows, columns = shape
    image = torch.randn(n, 3, rows * BLOCK, columns * BLOCK, device="cuda")
    if given != "planes":
        image = image.to(given).contiguous(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if given == torch.bfloat16 else torch.float16
    padded = stem.split_padded(image, *where, BLOCK, dtype)
    every = []
    for block in (8, 16, 32):
        scale = Scale.of(block, grid.n_high, grid.mask.numel())
        tilings = [Tiling.of_patches(scale, tiles) for tiles in range(1, 400)]
        cuts = {Cut(block, tiling): None for tiling in (Tiling.of(scale), *tilings) if tiling}
        every += [cut for cut in cuts if cut.tiling.has_patches][:4]
    assert len(every) >= 7
    assert any(cut.tiling.triples for cut in every[:6])
    for most_keys, most_cuts in ((18, 7), (12, 6), (7, 2), (0, 0)):
        keys, cuts = KEYS[:most_keys], every[:most_cuts]
        found = front.begin(image, grid, BLOCK, dtype, keys, cuts)
        assert torch.equal(found.padded.view(torch.int16), padded.view(torch.int16))
        expected = tables.build_tables(*where, keys)
        assert found.tables.keys() == expected.keys()
        assert all(torch.equal(found.tables[key], expected[key]) for key in keys)
        expected = patches.build_patches(*where, cuts)
        assert found.tiles.keys() == expected.keys()
        assert all(torch.equal(found.tiles[key], expected[key]) for key in expected)
