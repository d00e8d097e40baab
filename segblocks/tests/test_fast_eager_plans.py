"""What eager inference keeps between calls: packed weights and which tables a grid will need."""

import gc
from types import SimpleNamespace

import pytest
import torch
from agreement import make_grid
from neighbours import neighbour_table, own_rows
from torch import nn

from segblocks import BlockGrid
from segblocks.fast import buffers, grid_tables, launches, pending, weights
from segblocks.fast.launches import Plan
from segblocks.fast.sources import Source
from segblocks.fast.tables import MOST_TABLES, Scale, TableKey, table_shape


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(weights, "_PACKED", {})
    monkeypatch.setattr(grid_tables, "_WANTED", {})


@pytest.fixture
def built(monkeypatch):
    """The keys of each launch that makes tables; their addresses have to lie in one buffer."""
    launches = []

    class Launch:
        def __init__(self, n_high, keys):
            self.n_high, self.keys = n_high, keys

        def enqueue(self, index, slot, cells, *addresses):
            assert len(addresses) == MOST_TABLES
            assert not any(addresses[len(self.keys) :])
            assert all(address and address % 16 == 0 for address in addresses[: len(self.keys)])
            launches.append(sorted((k.block, k.stride, k.centre) for k in self.keys))

    def prepare(shape, n_high, keys, device):
        return Launch(n_high, keys)

    monkeypatch.setattr(grid_tables, "prepare_tables", prepare)
    monkeypatch.setattr(grid_tables, "_layout", grid_tables._layout.__wrapped__)
    return launches


def test_packed_weights_follow_their_tensors():
    conv = nn.Conv2d(64, 64, 3).half()
    first = weights.packed(conv.weight, conv.bias)
    assert weights.packed(conv.weight, conv.bias) is first
    with torch.no_grad():
        conv.bias.add_(1)
    second = weights.packed(conv.weight, conv.bias)
    assert torch.equal(second.shift[:64], conv.bias.float())
    with torch.no_grad():
        conv.weight.zero_()
    third = weights.packed(conv.weight, conv.bias)
    assert not third.matrix.any()
    assert weights.packed(conv.weight, None) is not third
    conv.weight.data = torch.ones_like(conv.weight)
    assert weights.packed(conv.weight, None).matrix.any()


def test_packed_weights_go_with_their_tensor():
    conv = nn.Conv2d(64, 64, 3).half()
    weights.packed(conv.weight, None)
    assert len(weights._PACKED) == 1
    del conv
    gc.collect()
    assert not weights._PACKED


def test_a_grid_gets_the_tables_of_the_one_before_at_once(built):
    keys = [(8, 1, True), (8, 1, False), (4, 1, True), (8, 2, False)]
    for seed in range(3):
        grid = BlockGrid.from_mask(make_grid("mixed", seed=seed))
        for key in keys:
            grid_tables.table(grid, key, 0)
            grid_tables.table(grid, key, 0)
        assert set(grid.tables) == set(keys)
    assert built == [[k] for k in keys] + [sorted(keys)] * 2


def test_what_is_remembered_is_bounded(built):
    for size in range(1, 60):
        grid = BlockGrid.from_mask(torch.ones(1, 1, size, dtype=torch.bool))
        for block in range(2, 90, 2):
            grid_tables.table(grid, (block, 1, True), 0)
    assert len(grid_tables._WANTED) <= grid_tables._MOST_KEYS + 1
    assert all(len(keys) <= grid_tables._MOST_KEYS for keys in grid_tables._WANTED.values())


@pytest.mark.parametrize("kind", ["none", "mixed", "all"])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 1)])
def test_plans_fit_the_tables(kind, stride, kernel):
    """Sizes of the buffers that a plan asks for, against tables written with plain indexing."""
    mask = make_grid(kind)
    grid = BlockGrid.from_mask(mask)
    size = (8, grid.n_high, grid.n_blocks)
    plan = Plan(*size, stride, kernel, (64, 128), torch.float16, 0, torch.device("cuda"))
    assert plan.scale.rows == grid.stored_pixels(8 // stride) == len(own_rows(mask, 8 // stride))
    assert plan.source == Scale.of(8, grid.n_high, grid.n_blocks)
    read = int(neighbour_table(mask, 8, stride).max())
    assert read == plan.source.rows + plan.averages - 1  # the row of zeros
    assert plan.wide == (kernel > 1)
    assert plan.stored == (plan.scale.rows, 128)
    assert plan.extended == (plan.scale.zero + 1, 128)
    assert plan.tail == plan.scale.rows * 128 * 2


def test_streams_wait_for_the_one_that_made_the_tables(built, monkeypatch):
    waited, capturing = [], []
    monkeypatch.setattr(pending, "follow", lambda stream, *rest: waited.append(stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    grid, one, other = BlockGrid.from_mask(make_grid("mixed")), (8, 1, True), (8, 2, True)
    for key, stream, expected in (
        (one, 5, []),  # made on 5
        (one, 5, []),
        (one, 6, [5]),
        (one, 6, []),
        (other, 6, []),  # made on 6, which comes after 5
        (one, 5, [6]),
        (other, 5, []),
    ):
        grid_tables.table(grid, key, stream)
        assert waited == expected
        waited.clear()
    capturing.append(True)
    grid_tables.table(grid, one, 7)
    assert 7 not in grid.streams


@pytest.mark.parametrize("capturing", [False, True])
def test_what_a_captured_launch_reads_lives_as_long_as_the_grid(built, monkeypatch, capturing):
    """Caches let go of packed weights when the weights have changed."""
    taken = []
    kernel = SimpleNamespace(pack=lambda *addresses: taken.append(addresses) or b"", constants=b"")
    monkeypatch.setattr(Plan, "_prepare", lambda self, *setting: kernel)
    monkeypatch.setattr(launches, "put", lambda *args: None)
    monkeypatch.setattr(buffers, "_empty_strided", None)  # it is for CUDA alone
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    grid, conv = BlockGrid.from_mask(make_grid("mixed")), nn.Conv2d(64, 64, 3).half()
    plan = Plan(8, grid.n_high, grid.n_blocks, 1, 3, (64, 64), torch.float16, -1, grid.slot.device)
    packed = weights.packed(conv.weight, conv.bias)
    pixels = torch.zeros(grid.stored_pixels(8), 64, dtype=torch.float16)
    source = Source(pixels.data_ptr(), pixels.data_ptr(), (pixels,))
    job = ((source, packed, grid, 5, False), "", None, None)
    cell = pending.Pending(plan, grid.later, job)
    plan.run(cell, job, extend=True)
    assert cell.buffer.shape == plan.extended
    assert taken[0][0] == pixels.data_ptr()
    held = {id(t) for t in grid.buffers}
    assert {id(packed.matrix), id(packed.shift)} <= held or not capturing
    assert len(grid.buffers) == (4 if capturing else 2)  # tables, one by one


def test_tables_lie_one_after_another(built):
    grid, keys = (
        BlockGrid.from_mask(make_grid("mixed")),
        ((8, 1, True), (8, 1, False), (8, 2, False)),
    )
    for seed in range(2):  # the second grid gets all of them in one buffer
        grid = BlockGrid.from_mask(make_grid("mixed", seed=seed))
        for key in keys:
            grid_tables.table(grid, key, 0)
    (buffer,) = grid.buffers
    ends = [buffer.data_ptr()]
    for key in keys:
        taps, pitch = table_shape(TableKey(*key), grid.n_high, grid.n_blocks)
        assert ends[-1] <= grid.tables[key]
        ends.append(grid.tables[key] + 4 * taps * pitch)
    assert ends[-1] <= buffer.data_ptr() + 4 * buffer.numel()
