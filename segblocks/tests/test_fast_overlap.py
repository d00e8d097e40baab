"""Compiled models whose kernels start while those ahead of them still run: the same bits."""

import pytest
import torch
from agreement import GRIDS, make_grid
from fast_models import ON_HOPPER, build, picture, random_grid
from fast_networks import Net
from test_fast_fuse import FUSED
from torch import Tensor

import segblocks
from segblocks.ops.cuda import overlap
from segblocks.structure import find

pytestmark = ON_HOPPER


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """An entry for each launch that may overlap."""
    found, launcher = [], overlap.launcher

    def noted(driver):
        found.append(1)
        return launcher(driver)

    monkeypatch.setattr(overlap, "launcher", noted)
    return found


@pytest.fixture
def both(monkeypatch):
    """A model compiled so that its launches overlap, and so that they do not."""

    def compile(model, image, dtype=torch.float16):
        monkeypatch.setenv("SEGBLOCKS_OVERLAP", "1")
        fast = segblocks.compile(model, image, dtype)
        monkeypatch.setenv("SEGBLOCKS_OVERLAP", "0")
        return fast, segblocks.compile(model, image, dtype)

    return compile


def same(found, expected) -> bool:
    found, expected = find(found, Tensor), find(expected, Tensor)
    pairs = list(zip(found, expected))
    return len(found) == len(expected) > 0 and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("net", ["swiftnet", "resnet18", "efficientnet"])
def test_whole_networks(net, dtype, both, launched):
    model, image = build("cuda", net), picture("cuda", 200, 300, n=2)
    fast, plain = both(model, image, dtype)
    for budget in (0, 1, 0.4, 1.0):
        expected = plain(image, budget=budget)
        assert not launched, "switched off"
        found = fast(image, budget=budget)
        assert len(launched) > 12
        launched.clear()
        assert same([found.logits, found.grid], [expected.logits, expected.grid])
        assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("name", FUSED)
def test_every_pattern(name, both):
    """256 channels are enough for the inner dimension to be taken in parts."""
    model = build("cuda", Net(FUSED[name][0], 256, stem=True), "middle", block=32)
    image = picture("cuda", 64, 96, n=2)
    fast, plain = both(model, image)
    for kind in GRIDS:
        grid = make_grid(kind).cuda()
        expected = plain.execute(image, grid)
        for _ in range(5):
            assert same(fast.execute(image, grid), expected)


def test_thresholds(both):
    """A graph that decides, and one that runs the network."""
    model, image = build("cuda"), picture("cuda")
    fast, plain = both(model, image)
    for seed in range(10):
        image = picture("cuda", seed=seed)
        found, expected = fast(image), plain(image)
        assert same([found.logits, found.grid], [expected.logits, expected.grid])


@pytest.mark.parametrize("net", ["swiftnet", "resnet18", "efficientnet"])
def test_many_replays(net, both):
    """Images, grids and counts change from one replay to the next, which is not waited for."""
    model = build("cuda", net)
    shape, size = (1, 4, 5), (256, 320) if net == "resnet18" else (128, 160)
    fast, plain = both(model, picture("cuda", *size))
    images = [picture("cuda", *size, seed=seed) for seed in range(200)]
    grids = [random_grid(shape, "cuda", seed, (seed % 5) / 4) for seed in range(200)]
    counts = [int(grid.sum()) for grid in grids]
    results = []
    for one in (plain, fast):
        results.append([
            one.execute(image, grid, count).clone()
            for image, grid, count in zip(images, grids, counts)
        ])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*results))
    results = [
        [one(image, budget=seed % 7).logits.clone() for seed, image in enumerate(images)]
        for one in (plain, fast)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_large_maps(both):
    """Kernels of several waves, each of which fills the device."""
    model, image = build("cuda", "resnet18", block=128), picture("cuda", 1024, 2048)
    fast, plain = both(model, image)
    for seed in range(3):
        image = picture("cuda", 1024, 2048, seed=seed)
        for budget in (26, 51, 128):
            expected = plain(image, budget=budget).logits.clone()
            for _ in range(10):
                assert torch.equal(fast(image, budget=budget).logits, expected)
