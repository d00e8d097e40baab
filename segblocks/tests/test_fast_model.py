"""`segblocks.compile`: a compiled model gives what the model gives, on CPU and on CUDA."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fast_models import (
    BOUND,
    DEVICES,
    assert_close,
    build,
    eager,
    picture,
    random_grid,
    relative_error,
)
from fast_networks import C, Net
from torch import nn

import segblocks

on_every_device = pytest.mark.parametrize("device", DEVICES)


# -- agreement -------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("net", ["swiftnet", "resnet18", "efficientnet"])
@pytest.mark.parametrize(("height", "width", "n"), [(128, 192, 1), (90, 150, 2)])
def test_agrees_with_eager_at_every_budget(device, net, height, width, n):
    model, image = build(device, net), picture(device, height, width, n)
    fast = segblocks.compile(model, image)
    expected = model(image, budget=0)
    blocks = expected.grid[0].numel()
    for budget in (0, 1, 0.5, blocks):
        count = budget if isinstance(budget, int) else round(budget * blocks)
        result = fast(image, budget=budget)
        assert result.grid.shape == expected.grid.shape
        assert (result.grid.flatten(1).sum(1) == count).all()
        assert result.n_high == n * count
        assert torch.equal(result.sampled, result.grid)
        assert float(result.share) == pytest.approx(count / blocks)
        assert_close(fast, model, image, result)


@on_every_device
@pytest.mark.parametrize("policy", ["reinforce", "heuristic", "random", "middle"])
def test_decides_as_the_policy_does(device, policy):
    model, image = build(device, policy=policy), picture(device, n=2)
    if policy == "heuristic":
        scores = model.policy.scores(F.pad(image, (0, 8, 0, 6)), None)
        # Between two scores, so that rounding does not change the choice.
        model.policy.percent_target = float(scores.flatten().sort()[0][11:13].mean())
    fast = segblocks.compile(model, image)
    result, expected = fast(image), model(image)
    assert_close(fast, model, image, result)
    assert result.grid.any()
    assert not result.grid.all()
    assert not (result.sampled & ~result.grid).any()
    assert int(result.grid.sum()) == result.n_high
    assert result.probs is None or torch.allclose(result.probs, expected.probs, atol=2e-2)
    assert (result.log_probs is None) == (expected.log_probs is None)
    if policy != "random":
        # Half precision may decide otherwise where scores are nearly equal.
        assert int((result.grid != expected.grid).sum()) <= (0 if device == "cpu" else 2)
        assert torch.allclose(result.scores, expected.scores, rtol=2e-2, atol=2e-2)


@on_every_device
def test_a_random_policy_draws_again_at_every_call(device):
    model, image = build(device, policy="random"), picture(device)
    fast = segblocks.compile(model, image)
    grids = [fast(image).grid.clone() for _ in range(8)]
    assert any(not torch.equal(grids[0], grid) for grid in grids[1:])


@on_every_device
def test_rounds_up_the_number_of_blocks_as_the_model_does(device):
    model, image = build(device), picture(device, 128, 256)
    model.policy.quantize_percentage = 0.25
    fast = segblocks.compile(model, image)
    for seed in range(6):
        result = fast(picture(device, 128, 256, seed=seed))
        assert int(result.grid.sum()) == result.n_high
        assert result.n_high % 8 == 0
        assert 0 <= result.n_high - int(result.sampled.sum()) < 8


@on_every_device
def test_no_stale_data_in_a_hundred_images(device):
    """Images, grids, counts and shapes change from call to call."""
    model = build(device)
    shapes = [(64, 96, 1), (50, 80, 2)]
    fast = segblocks.compile(model, picture(device, *shapes[0]))
    for seed in range(100):
        image = picture(device, *shapes[seed % 7 == 0], seed=seed)
        if seed % 3 == 0:
            result = fast(image, budget=seed % 6)
            assert_close(fast, model, image, result)
        elif seed % 3 == 1:
            assert_close(fast, model, image, fast(image))
        else:
            shape = (image.shape[0], 2, 3)
            grid = random_grid(shape, device, seed, (seed % 5) / 4)
            found = fast.execute(image, grid)
            assert relative_error(found, eager(model, image, grid)) < BOUND[fast.dtype]


@on_every_device
def test_same_bits_twice(device):
    model, image = build(device), picture(device, n=2)
    fast = segblocks.compile(model, image)
    first = fast(image, budget=0.5).logits.clone()
    thresholded = fast(image).logits.clone()
    for seed in range(3):
        fast(picture(device, n=2, seed=seed + 5), budget=3)
        assert torch.equal(fast(image, budget=0.5).logits, first)
        assert torch.equal(fast(image).logits, thresholded)
    again = segblocks.compile(model, image)
    assert torch.equal(again(image, budget=0.5).logits, first)


@on_every_device
def test_legacy_resizing(device):
    model, image = build(device, legacy_upsample=True), picture(device)
    fast = segblocks.compile(model, image)
    plain = build(device)
    result = fast(image, budget=0.5)
    assert_close(fast, model, image, result)
    assert relative_error(eager(plain, image, result.grid), eager(model, image, result.grid)) > 0.01


@on_every_device
def test_images_of_every_layout(device):
    model, image = build(device), picture(device)
    fast = segblocks.compile(model, image)
    expected = fast(image, budget=0.5).logits.clone()
    wide = picture(device, 100, 140)
    wide[:, :, 3:93, 7:127] = image
    for view in (
        image.contiguous(memory_format=torch.channels_last),
        image.transpose(2, 3).contiguous().transpose(2, 3),
        wide[:, :, 3:93, 7:127],
    ):
        before = view.clone()
        assert torch.equal(fast(view, budget=0.5).logits, expected)
        assert torch.equal(view, before), "the image changed"


class Outputs(nn.Module):
    """Returns a dict of several scales, one of them with its channels last."""

    def __init__(self):
        super().__init__()
        self.net = Net(None)
        self.net.first = nn.Conv2d(3, C, 3, 2, 1).double()

    def forward(self, image):
        x = self.net.first(image)
        y = F.relu(self.net.norm(self.net.conv(x)))
        low = self.net.strided(y)
        return {"out": y, "aux": [low, (x,)], "last": low.permute(0, 2, 3, 1)}


@on_every_device
def test_networks_that_return_structures(device):
    model, image = build(device, Outputs(), block=16), picture(device, 64, 96)
    fast = segblocks.compile(model, image)
    result = fast(image, budget=0.5)
    assert list(result.logits) == ["out", "aux", "last"]
    assert_close(fast, model, image, result)


# -- what a compiled model keeps apart -------------------------------------------------------------


@on_every_device
def test_the_model_itself_stays_as_it_is(device):
    model, image = build(device), picture(device)
    before = copy.deepcopy(model.state_dict())
    strides = {name: value.stride() for name, value in before.items()}
    fast = segblocks.compile(model, image)
    fast(image, budget=0.5)
    fast(image)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
        assert value.stride() == strides[name]
    assert all(p.requires_grad for p in model.net.parameters())


@on_every_device
def test_training_on_leaves_the_compiled_model_alone(device):
    model, image = build(device), picture(device)
    fast = segblocks.compile(model, image)
    first = fast(image, budget=0.5).logits.clone()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    assert torch.equal(fast(image, budget=0.5).logits, first)


@on_every_device
def test_two_compiled_models_at_once(device):
    image = picture(device)
    models = [build(device), build(device)]
    with torch.no_grad():
        for parameter in models[1].net.parameters():
            parameter.mul_(1.1)
    compiled = [segblocks.compile(model, image) for model in models]
    for seed in range(4):
        image = picture(device, seed=seed)
        results = [fast(image, budget=0.5) for fast in compiled]
        for fast, model, result in zip(compiled, models, results):
            assert_close(fast, model, image, result)


def test_results_on_the_cpu_are_the_callers_own():
    model = build("cpu")
    fast = segblocks.compile(model, picture("cpu"))
    results = [
        fast(picture("cpu", seed=seed), **more) for seed, more in enumerate([{}, {"budget": 3}])
    ]
    kept = [[x.clone() for x in (r.logits, r.grid, r.sampled, r.scores)] for r in results]
    for seed in range(5, 8):
        fast(picture("cpu", seed=seed))
        fast(picture("cpu", seed=seed), budget=2)
    for result, values in zip(results, kept):
        for mine, before in zip(
            (result.logits, result.grid, result.sampled, result.scores), values
        ):
            assert torch.equal(mine, before)
