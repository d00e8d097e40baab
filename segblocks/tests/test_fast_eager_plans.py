"""What eager inference keeps between calls: packed weights and which tables a grid will need."""

import gc

import pytest
import torch
from agreement import make_grid
from neighbours import neighbour_table, own_rows
from torch import nn

from segblocks import BlockGrid
from segblocks.fast import eager
from segblocks.fast.tables import Scale


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(eager, "_PACKED", {})
    monkeypatch.setattr(eager, "_WANTED", {})


@pytest.fixture
def built(monkeypatch):
    """The keys of each launch of `build_tables`."""
    launches = []

    def build(slot, cells, n_high, keys):
        launches.append(sorted((k.block, k.stride, k.centre) for k in keys))
        return {key: torch.zeros(1) for key in keys}

    monkeypatch.setattr(eager, "build_tables", build)
    return launches


def test_packed_weights_follow_their_tensors():
    conv = nn.Conv2d(64, 64, 3).half()
    first = eager._packed(conv.weight, conv.bias)
    assert eager._packed(conv.weight, conv.bias) is first
    with torch.no_grad():
        conv.bias.add_(1)
    second = eager._packed(conv.weight, conv.bias)
    assert torch.equal(second.shift[:64], conv.bias.float())
    with torch.no_grad():
        conv.weight.zero_()
    third = eager._packed(conv.weight, conv.bias)
    assert not third.matrix.any()
    assert eager._packed(conv.weight, None) is not third
    conv.weight.data = torch.ones_like(conv.weight)
    assert eager._packed(conv.weight, None).matrix.any()


def test_packed_weights_go_with_their_tensor():
    conv = nn.Conv2d(64, 64, 3).half()
    eager._packed(conv.weight, None)
    assert len(eager._PACKED) == 1
    del conv
    gc.collect()
    assert not eager._PACKED


def test_a_grid_gets_the_tables_of_the_one_before_at_once(built):
    keys = [(8, 1, True), (8, 1, False), (4, 1, True), (8, 2, False)]
    for seed in range(3):
        grid = BlockGrid.from_mask(make_grid("mixed", seed=seed))
        for key in keys:
            eager._table(grid, key)
            eager._table(grid, key)
        assert set(grid.tables) == set(keys)
    assert built == [[k] for k in keys] + [sorted(keys)] * 2


def test_what_is_remembered_is_bounded(built):
    for size in range(1, 60):
        grid = BlockGrid.from_mask(torch.ones(1, 1, size, dtype=torch.bool))
        for block in range(2, 90, 2):
            eager._table(grid, (block, 1, True))
    assert len(eager._WANTED) <= eager._MOST_KEYS + 1
    assert all(len(keys) <= eager._MOST_KEYS for keys in eager._WANTED.values())


@pytest.mark.parametrize("kind", ["none", "mixed", "all"])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 1)])
def test_plans_fit_the_tables(kind, stride, kernel):
    """Sizes of the buffers that a plan asks for, against tables written with plain indexing."""
    mask = make_grid(kind)
    grid = BlockGrid.from_mask(mask)
    plan = eager._plan(8, grid.n_high, grid.n_blocks, stride, kernel, 64, 128)
    assert plan.scale.rows == grid.stored_pixels(8 // stride) == len(own_rows(mask, 8 // stride))
    assert plan.source == Scale.of(8, grid.n_high, grid.n_blocks)
    read = int(neighbour_table(mask, 8, stride).max())
    assert read == plan.source.rows + plan.averages - 1  # the row of zeros
    assert (plan.here is None) == (kernel == 1)
