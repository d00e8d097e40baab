"""What holds for every network on blocks: the invariants of the definition."""

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, distance, make_grid, make_image
from definition import slow_execute, slow_no_blocks
from networks import (
    convnext_trunk,
    efficientnet_trunk,
    mobilenet_v2_trunk,
    random_network,
    resnet18_trunk,
)
from torch import nn

from segblocks import execute_with_grid, no_blocks

SEEDS = range(16)
TRUNKS = {
    # name: build(no_blocks of either implementation), block of the image
    "resnet18": (lambda wrap: resnet18_trunk(), 64),
    "mobilenet_v2": (lambda wrap: mobilenet_v2_trunk(), 32),
    "efficientnet, gate": (lambda wrap: efficientnet_trunk(wrap, True), 16),
    "efficientnet, whole": (lambda wrap: efficientnet_trunk(wrap, False), 16),
    "convnext": (lambda wrap: convnext_trunk(), 32),
}


def build_trunk(name, wrap):
    build, block = TRUNKS[name]
    torch.manual_seed(0)
    return build(wrap), block


def dense(net, image):
    with torch.no_grad():
        return net(image)


def halve(image):
    return F.avg_pool2d(image, 2)


def double(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


# -- 1: all high = dense -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("training", [False, True])
def test_all_high_is_dense(seed, training):
    grid = make_grid("all")
    image = make_image(grid, 3, 16, seed)
    net = random_network(seed).train(training)
    expected = dense(copy.deepcopy(net), image)
    assert expected.std() > 1e-3
    with torch.no_grad():
        assert distance(execute_with_grid(net, image, grid), expected) < TOLERANCE


@pytest.mark.parametrize("name", TRUNKS)
def test_all_high_is_dense_for_known_networks(name):
    net, block = build_trunk(name, no_blocks)
    grid = make_grid("all", (1, 1, 2))
    image = make_image(grid, 3, block)
    expected = dense(net, image)
    with torch.no_grad():
        assert distance(execute_with_grid(net, image, grid), expected) < TOLERANCE


# -- 2: all low = dense on the averaged image, enlarged --------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("training", [False, True])
def test_all_low_is_dense_at_half_size(seed, training):
    grid = make_grid("none")
    image = make_image(grid, 3, 16, seed)
    net = random_network(seed).train(training)
    expected = double(dense(copy.deepcopy(net), halve(image)))
    with torch.no_grad():
        assert distance(execute_with_grid(net, image, grid), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "convnext"])
def test_all_low_is_dense_at_half_size_for_known_networks(name):
    net, block = build_trunk(name, no_blocks)
    grid = make_grid("none", (1, 1, 2))
    image = make_image(grid, 3, block)
    expected = double(dense(net, halve(image)))
    with torch.no_grad():
        assert distance(execute_with_grid(net, image, grid), expected) < TOLERANCE


# -- 3: a mixed grid = the definition, forward and backward ----------------------------------------


def forward_and_gradients(run, net, image, *settings):
    leaf = image.clone().requires_grad_()
    out = run(net, leaf, *settings)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    parameters = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad((out * weight).sum(), [leaf, *parameters])
    return [out, *grads, *net.buffers()]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_mixed_grid_is_the_definition(seed, training, legacy):
    """Outputs, gradients of image and weights, and running statistics."""
    grid = make_grid("one" if seed % 4 == 3 else "mixed", (2, 2, 2), seed)
    image = make_image(grid, 3, 16, seed)
    net = random_network(seed).train(training)
    mine = forward_and_gradients(execute_with_grid, copy.deepcopy(net), image, grid, legacy)
    theirs = forward_and_gradients(slow_execute, net, image, grid, legacy)
    for a, b in zip(mine, theirs, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))
        assert distance(a, b) < TOLERANCE * scale


@pytest.mark.parametrize("name", TRUNKS)
def test_mixed_grid_is_the_definition_for_known_networks(name):
    grid = torch.tensor([[[True, False], [False, True]]])
    mine, block = build_trunk(name, no_blocks)
    theirs, _ = build_trunk(name, slow_no_blocks)
    image = make_image(grid, 3, block)
    mine = forward_and_gradients(execute_with_grid, mine, image, grid)
    theirs = forward_and_gradients(slow_execute, theirs, image, grid)
    for a, b in zip(mine, theirs, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))
        assert distance(a, b) < TOLERANCE * scale


def test_resolutions_matter():
    """The tests above compare unequal things: high, low and mixed differ, and so does legacy."""
    grid = make_grid("mixed")
    image = make_image(grid, 3, 16)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear")
    )
    net = net.double()
    outs = [
        execute_with_grid(net, image, make_grid("all")),
        execute_with_grid(net, image, make_grid("none")),
        execute_with_grid(net, image, grid),
        execute_with_grid(net, image, grid, legacy_upsample=True),
    ]  # fmt: skip
    for i, a in enumerate(outs):
        for b in outs[:i]:
            assert distance(a, b) > 1e-2


# -- 5: same seed, same bits -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", list(SEEDS)[:6])
def test_same_seed_same_bits(seed):
    grid = make_grid("mixed", seed=seed)
    image = make_image(grid, 3, 16, seed)
    runs = [
        forward_and_gradients(execute_with_grid, random_network(seed).train(), image, grid)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_dropout_repeats_with_the_seed():
    grid = make_grid("mixed")
    image = make_image(grid, 3, 16)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.Dropout(0.5), nn.Dropout2d(0.5)).double()
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(execute_with_grid(net, image, grid))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# -- 6: nothing is mutated -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_evaluation_changes_nothing(seed):
    """Neither image, grid, weights, statistics nor precision; and what is kept stays as it was."""
    grid = make_grid("mixed", seed=seed)
    image = make_image(grid, 3, 16, seed)
    net = random_network(seed).eval()
    state = copy.deepcopy(net.state_dict())
    kept = image.clone(), grid.clone()
    with torch.no_grad():
        first = execute_with_grid(net, image, grid)
        copied = first.clone()
        second = execute_with_grid(net, image, grid)
    assert torch.equal(first, copied)
    assert torch.equal(first, second)
    assert torch.equal(image, kept[0])
    assert torch.equal(grid, kept[1])
    for name, value in net.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_close(dtype):
    grid = make_grid("mixed")
    image = make_image(grid, 3, 16)
    net = random_network(1).eval()
    with torch.no_grad():
        exact = execute_with_grid(net, image, grid)
        out = execute_with_grid(copy.deepcopy(net).to(dtype), image.to(dtype), grid)
    assert out.dtype == dtype
    close = 100 * torch.finfo(dtype).eps
    assert distance(out.double(), exact) < close * max(1.0, float(exact.abs().max()))


def test_autocast_runs_blocks_in_lower_precision():
    grid = make_grid("mixed")
    image = make_image(grid, 3, 16, dtype=torch.float32)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.MaxPool2d(3, 2, 1)
    )
    with torch.no_grad():
        exact = execute_with_grid(net, image, grid)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = execute_with_grid(net, image, grid)
    assert out.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert distance(out.float(), exact) < 0.1


# -- 8: no silent substitution ---------------------------------------------------------------------


@pytest.mark.parametrize("head", [nn.AdaptiveAvgPool2d(1), nn.GroupNorm(2, 4), nn.Flatten()])
def test_what_blocks_cannot_do_raises_inside_a_network(head):
    grid = make_grid("mixed")
    net = nn.Sequential(random_network(0), head.double())
    with pytest.raises(NotImplementedError, match="no_blocks"):
        execute_with_grid(net, make_image(grid, 3, 16), grid)
