"""Compiled models on Hopper: its own kernels, in half precision, in CUDA graphs."""

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, make_grid, make_image
from fast_models import (
    BOUND,
    ON_HOPPER,
    assert_close,
    build,
    eager,
    picture,
    random_grid,
    relative_error,
)
from fast_networks import Net
from neighbours import (
    extended,
    neighbour_table,
    own_rows,
    padded_blocks,
    stem_places,
)
from test_fast_apart import APART
from test_fast_fuse import FUSED

import segblocks
from segblocks import BlockGrid, no_blocks, to_blocks
from segblocks.fast import plan as plan_module
from segblocks.fast import run, stem, tables
from segblocks.fast.tables import Scale, TableKey
from segblocks.structure import find

pytestmark = ON_HOPPER

KERNELS = "fused Hopper kernels"
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


# -- what goes round the convolutions --------------------------------------------------------------


def close(found, expected, dtype):
    tolerance = {torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
    assert found.shape == expected.shape
    return float((found.cpu().double() - expected.double()).abs().max()) < tolerance


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("block", [2, 4, 16])
def test_neighbour_tables(kind, block):
    mask = make_grid(kind)
    grid = BlockGrid.from_mask(mask.cuda())
    keys = [TableKey(block, centre=True), TableKey(block)]
    if block > 2:
        keys += [TableKey(block, 2), TableKey(block, 2, centre=True)]
    keys += [TableKey(block * 2**i) for i in range(1, 7 if block == 2 else 2)]  # over one launch
    found = tables.build_tables(grid.slot, grid.cells, grid.n_high, keys)
    for key in keys:
        if key.block > 16:
            continue
        expected = neighbour_table(mask, key.block, key.stride)
        expected = expected[4:5] if key.centre else expected
        columns, table = expected.shape[1], found[key].cpu().long()
        assert torch.equal(table[:, :columns], expected)
        zero = Scale.of(key.block, grid.n_high, mask.numel()).zero
        assert (table[:, columns:] == zero).all(), "rows beyond the last read zeros"
    assert torch.equal(
        found[keys[0]][0, : own_rows(mask, block).numel()].cpu().long(), own_rows(mask, block)
    )


@HALF
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_padded_blocks_averages_and_pooling(kind, dtype):
    mask, block = make_grid(kind), 16
    grid = BlockGrid.from_mask(mask.cuda())
    image = make_image(mask, 3, block)
    for given in (
        image.float(),
        image.to(dtype),
        image.float().transpose(2, 3).contiguous().transpose(2, 3),
    ):
        split = stem.split_padded(given.cuda(), grid.slot, grid.cells, grid.n_high, block, dtype)
        assert close(split, padded_blocks(given.double(), mask), dtype)
    half = Scale.of(block // 2, grid.n_high, mask.numel())
    places = stem.stem_places(half, grid.n_high, mask.numel(), block, torch.device("cuda", 0))
    expected = stem_places(mask, block)
    assert torch.equal(places[: expected.numel()].cpu().long(), expected)

    x = to_blocks(make_image(mask, 24, block).to(dtype), BlockGrid.from_mask(mask))
    scale = Scale.of(block, grid.n_high, mask.numel())
    keys = [TableKey(block, centre=True), TableKey(block // 2, centre=True), TableKey(block, 2)]
    found = tables.build_tables(grid.slot, grid.cells, grid.n_high, keys)
    whole = stem.extend(x.pixels.cuda(), found[keys[0]][0], scale)
    assert close(whole, extended(x), dtype)
    pooled = stem.max_pool(whole, found[keys[2]], found[keys[1]][0], scale, half)
    expected = extended(F.max_pool2d(x, 3, 2, 1))
    assert close(pooled, expected, dtype)


# -- every pattern of fused steps ------------------------------------------------------------------


def check_pattern(function, channels, dtype):
    """A network of one pattern on several grids, against float64."""
    model = build("cuda", Net(function, channels, stem=True), "middle", block=32)
    image = picture("cuda", 64, 96, n=2)
    fast = segblocks.compile(model, image, dtype)
    for kind in GRIDS:
        grid = make_grid(kind).cuda()
        expected, found = eager(model, image, grid), fast.execute(image, grid)
        for mine, theirs in zip(find(found, torch.Tensor), find(expected, torch.Tensor)):
            assert relative_error(mine, theirs) < BOUND[dtype]
    return fast.how


@pytest.mark.parametrize("channels", [64, 128, 256])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
def test_fused_patterns(name, channels):
    """256 channels are enough for the inner dimension to be taken in parts."""
    assert KERNELS in check_pattern(FUSED[name][0], channels, torch.float16)


LEFT_OVER = pytest.mark.parametrize(
    "name", ["stride 2", "shortcut", "after", "bn, relu before", "classes"]
)


@LEFT_OVER
@pytest.mark.usefixtures("poisoned_memory")
def test_fused_patterns_with_a_round_left_over(name, monkeypatch):
    """Few multiprocessors, so that small maps take several rounds, the last in parts."""
    monkeypatch.setattr(run, "multiprocessors", lambda device: 3)
    check_pattern(FUSED[name][0], 256, torch.float16)


@pytest.mark.parametrize("name", ["residual", "shortcut", "after", "bn, relu before", "classes"])
def test_fused_patterns_in_bfloat16(name):
    assert KERNELS in check_pattern(FUSED[name][0], 128, torch.bfloat16)


@pytest.mark.parametrize("name", APART)
@pytest.mark.filterwarnings("ignore:.*runs without the fused kernels")
@pytest.mark.usefixtures("poisoned_memory")
def test_patterns_that_stay_apart(name):
    check_pattern(APART[name][0], 64, torch.float16)


# -- whole models ----------------------------------------------------------------------------------


NETWORKS = pytest.mark.parametrize("net", ["swiftnet", "resnet18", "efficientnet"])


def check_network(net, image_dtype, dtype, kernels):
    """A network at several budgets, beside the eager one; -> its image and the compiled model."""
    model = build("cuda", net)
    image = picture("cuda", 200, 300, n=2, dtype=image_dtype)
    fast = segblocks.compile(model, image, dtype)
    assert kernels in fast.how
    assert "CUDA graph" in fast.how
    for budget in (0, 1, 0.4, 1.0):
        result = fast(image, budget=budget)
        assert_close(fast, model, image, result)
    return image, fast


@HALF
@pytest.mark.parametrize("image_dtype", [torch.float32, None], ids=["fp32 image", "half image"])
@NETWORKS
def test_whole_networks(net, image_dtype, dtype):
    check_network(net, image_dtype or dtype, dtype, KERNELS)


def test_tiles_of_large_maps():
    check_large_maps()


def check_large_maps():
    """Enough pixels for the wide tile, which small tests do not reach."""
    model, image = build("cuda", "resnet18", block=128), picture("cuda", 1024, 2048)
    fast = segblocks.compile(model, image)
    result = fast(image, budget=0.6)
    assert_close(fast, model, image, result)


def test_all_high_is_dense():
    model, image = build("cuda"), picture("cuda", 128, 192)
    fast = segblocks.compile(model, image)
    found = fast.execute(image, torch.ones(1, 4, 6, dtype=torch.bool, device="cuda"))
    with torch.no_grad():
        assert relative_error(found, model.net.double()(image.double())) < BOUND[torch.float16]


def test_all_low_is_dense_on_the_averaged_image():
    model, image = build("cuda", "resnet18"), picture("cuda", 128, 192)
    fast = segblocks.compile(model, image)
    found = fast.execute(image, torch.zeros(1, 2, 3, dtype=torch.bool, device="cuda"))
    with torch.no_grad():
        low = model.net.double()(F.avg_pool2d(image.double(), 2))
    expected = F.interpolate(low, scale_factor=2, mode="bilinear")
    assert relative_error(found, expected) < BOUND[torch.float16]


def test_no_stale_data_on_large_images():
    check_no_stale_data(100)


def check_no_stale_data(images):
    """Grids, counts and images change; memory of all graphs is shared."""
    model = build("cuda", "resnet18")
    fast = segblocks.compile(model, picture("cuda", 256, 320))
    for seed in range(images):
        image = picture("cuda", 256, 320, seed=seed)
        grid = random_grid((1, 4, 5), "cuda", seed, (seed % 5) / 4)
        found = fast.execute(image, grid)
        assert relative_error(found, eager(model, image, grid)) < BOUND[torch.float16]


def test_a_fixed_budget_never_waits_for_the_device():
    model, image = build("cuda"), picture("cuda")
    fast = segblocks.compile(model, image)
    fast(image, budget=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [fast(image, budget=0.5).share for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(results[-1]) == 0.5


def test_runs_on_the_current_stream():
    model, image = build("cuda"), picture("cuda")
    fast = segblocks.compile(model, image)
    expected = fast(image, budget=0.5).logits.clone()
    late, stream = torch.zeros_like(image), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on another stream the graph would not wait for this
        late.copy_(image)
        found = fast(late, budget=0.5).logits.clone()
    stream.synchronize()
    assert torch.equal(found, expected)


def test_every_count_has_a_graph_and_their_number_is_bounded(monkeypatch):
    monkeypatch.setattr(plan_module, "MAX_GRAPHS", 4)
    model, image = build("cuda"), picture("cuda", 96, 128)
    fast = segblocks.compile(model, image)
    (plan,) = fast._plans.values()
    for count in (*range(13), 12, 0, 5):
        assert_close(fast, model, image, fast(image, budget=count))
        assert len(plan.graphs) <= 4


def test_what_waits_for_the_device_runs_without_graphs():
    """A function that looks at values, as one inside `no_blocks` may."""

    class Looking(Net):
        def forward(self, x):
            return no_blocks(self.look)(super().forward(x))

        def look(self, x):
            return x * 2 if x.max() > -torch.inf else x

    model = build("cuda", Looking(lambda net, x: net.conv(x), stem=True), "middle", 32)
    for height in (64, 96):
        image = picture("cuda", height, 96)
        fast = segblocks.compile(model, image)
        with pytest.warns(UserWarning, match="runs without CUDA graphs"):
            first = fast(image, budget=2)
        assert "CUDA graph" not in fast.how
        assert_close(fast, model, image, first)
        assert_close(fast, model, image, fast(image, budget=3))
        assert torch.randn(3, device="cuda").isfinite().all()  # the generator is as it was


def test_graphs_share_their_memory():
    """Ten counts cost little more than the largest alone."""
    model = build("cuda", "resnet18")
    image = picture("cuda", 512, 640)
    fast = segblocks.compile(model, image)
    torch.cuda.empty_cache()
    start = torch.cuda.memory_reserved()
    fast(image, budget=80)
    first = torch.cuda.memory_reserved()
    for count in range(8, 80, 8):
        fast(image, budget=count)
    assert torch.cuda.memory_reserved() - first < 0.5 * (first - start)


def test_refuses_what_it_was_not_compiled_for():
    model, image = build("cuda"), picture("cuda")
    fast = segblocks.compile(model, image)
    with pytest.raises(ValueError, match=r"compiled for .*float32.* got .*float16"):
        fast(image.half())
    with pytest.raises(ValueError, match=r"got .* on cpu"):
        fast(image.cpu())
    with pytest.raises(ValueError, match="working dtype"):
        segblocks.compile(model, image, torch.float32)
    with pytest.raises(ValueError, match="grid must be bool"):
        fast.execute(image, torch.ones(1, 1, 1, dtype=torch.bool, device="cuda"))
