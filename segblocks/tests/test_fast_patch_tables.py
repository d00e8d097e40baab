"""What `build_patches` writes, against tiles listed one by one."""

import pytest
from agreement import GRIDS, make_grid
from hopper_on_cpu import hopper_or_cpu  # noqa: F401
from test_fast_tilings import all_tiles

from segblocks import BlockGrid
from segblocks.fast import patches
from segblocks.fast.tables import Scale
from segblocks.fast.tilings import Cut, Tiling


@pytest.mark.parametrize("kind", GRIDS)
def test_tables_of_tiles(kind, device):
    mask = make_grid(kind)
    grid = BlockGrid.from_mask(mask.to(device))
    scales = [Scale.of(block, grid.n_high, mask.numel()) for block in (4, 8, 16, 24, 32)]
    cuts = [Cut(scale.block, Tiling.of(scale)) for scale in scales]
    for scale in scales:  # with more tables than a launch can fill
        tilings = [Tiling.of_patches(scale, tiles) for tiles in range(1, 200)]
        tilings = list(dict.fromkeys(t for t in tilings if t is not None))
        cuts += [Cut(scale.block, t) for t in {*tilings[:1], *tilings[len(tilings) // 2 :][:1]}]
    tables = patches.build_patches(grid.slot, grid.cells, grid.n_high, cuts)
    assert list(tables) == list(dict.fromkeys(cut for cut in cuts if cut.tiling.has_patches))
    assert any(cut.tiling.triples for cut in tables)
    for (block, tiling), table in tables.items():
        of_patches = tiling != Tiling.of(Scale.of(block, grid.n_high, mask.numel()))
        expected = all_tiles(mask, block, tiling.triples if of_patches else None)
        assert len(table) == tiling.tiles
        for found, tile in zip(table.tolist(), expected):
            found = found[: len(tile.inputs)], found[300:]
            assert found[0] == tile.inputs
            pixels = len(tile.outputs)
            assert found[1][:pixels] == tile.outputs
            assert found[1][pixels : pixels * 5 // 4] == tile.averages
