"""`segblocks.compile`: networks that stand in the way, new shapes, and what is refused."""

import pytest
import torch
from fast_models import DEVICES, assert_close, build, picture
from fast_networks import C, Net, SmallSwiftNet

import segblocks
from segblocks import SegBlocksModel, build_policy, no_blocks

on_every_device = pytest.mark.parametrize("device", DEVICES)


# -- networks that stand in the way ----------------------------------------------------------------


def gated(net, x):
    gate = no_blocks(lambda t: t.mean((2, 3), keepdim=True))(x)
    return net.conv(x) * torch.sigmoid(gate)


def pooled(net, x):
    return no_blocks(lambda t: t.mean((2, 3)))(net.conv(x))


def closed_over(net, x):
    gate = no_blocks(lambda t: t.mean((2, 3), keepdim=True))(x)
    return no_blocks(lambda t: t * gate)(net.conv(x))


def number(net, x):
    return net.conv(x) * float(no_blocks(lambda t: t.mean())(x))


def late(net, x):
    for layer in (net.conv, net.second):
        x = no_blocks(lambda t: layer(t) * t.mean((2, 3), keepdim=True))(x)  # noqa: B023
    return x


def combined(net, x):
    y = net.conv(x)
    return no_blocks(lambda t: t + y.combine().mean())(x)


def pixels_changed(net, x):
    y = net.conv(x)
    y.lowres.mul_(2)
    return y


def view_changed(net, x):
    y = net.conv(x)
    y[:, : C // 2].relu_()
    return y


@on_every_device
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (gated, "'no_blocks' returns a dense tensor"),
        (pooled, "dense"),
        (closed_over, "dense"),
        (number, "dense"),
        (late, "a variable that changes later"),
        (combined, "combined in the middle"),
        (pixels_changed, "pixels of blocks are taken"),
        (view_changed, "in place"),
    ],
)
def test_networks_that_cannot_be_replayed_run_anyway(device, function, named):
    model, image = build(device, Net(function), block=16), picture(device, 64, 96)
    with pytest.warns(UserWarning, match=named) as record:
        fast = segblocks.compile(model, image)
    assert sum("the network runs" in str(warning.message) for warning in record) == 1
    for seed in range(3):
        image = picture(device, 64, 96, seed=seed)
        result = fast(image, budget=0.5)
        assert_close(fast, model, image, result)


# -- refusals --------------------------------------------------------------------------------------


def test_refuses_what_it_cannot_serve():
    model, image = build("cpu"), picture("cpu")
    fast = segblocks.compile(model, image)
    with pytest.raises(ValueError, match=r"float32.*float64"):
        fast(image.double())
    with pytest.raises(ValueError, match="compiled for"):
        fast(image.to("meta"))
    with pytest.raises(ValueError, match=r"grid must be bool \(1, 3, 4\)"):
        fast.execute(image, torch.ones(1, 2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="grid must be bool"):
        fast.execute(image, torch.ones(1, 3, 4))
    with pytest.raises(ValueError, match="budget"):
        fast(image, budget=1.5)
    with pytest.raises(ValueError, match="budget of 13 blocks"):
        fast(image, budget=13)
    with pytest.raises((TypeError, ValueError), match=r"\(N, C, H, W\)|\(N, 3, H, W\)"):
        fast(image[0])
    with pytest.raises(ValueError, match="working dtype"):
        segblocks.compile(model, image, torch.float16)
    with pytest.raises(ValueError, match="eval"):
        segblocks.compile(build("cpu").train(), image)
    with pytest.raises(TypeError, match="takes a SegBlocksModel, got SmallSwiftNet"):
        segblocks.compile(SmallSwiftNet(), image)


@pytest.mark.parametrize(("policy", "reason"), [("disabled", "dense"), ("oracle", "labels")])
def test_refuses_policies_that_need_no_compiling(policy, reason):
    model = SegBlocksModel(SmallSwiftNet().float(), build_policy(policy, 32)).eval()
    with pytest.raises(ValueError, match=reason):
        segblocks.compile(model, picture("cpu"))


def test_new_shapes_are_compiled_once(monkeypatch):
    from segblocks.fast import plan as module

    built = []
    build_network = module.build_network

    def counted(net, image, *rest):
        built.append(tuple(image.shape))
        return build_network(net, image, *rest)

    monkeypatch.setattr(module, "build_network", counted)
    model = build("cpu")
    fast = segblocks.compile(model, picture("cpu", 64, 96))
    for height, width, n in [(64, 96, 1), (64, 128, 1), (60, 96, 2), (64, 128, 1), (60, 96, 2)]:
        image = picture("cpu", height, width, n)
        assert_close(fast, model, image, fast(image, budget=2))
    assert built == [(1, 3, 64, 96), (1, 3, 64, 128), (2, 3, 64, 96)]


def test_loading_and_running_apart():
    model = build("cpu")
    first, second = picture("cpu", seed=1), picture("cpu", 64, 96, seed=2)
    fast = segblocks.compile(model, first)
    with pytest.raises(RuntimeError, match=r"call load\(image\) first"):
        fast.run()
    for image in (first, second):
        fast.load(image)
        for budget in (1, 4):
            result = fast.run(budget)
            assert_close(fast, model, image, result)
            assert int(result.grid.sum()) == budget


@pytest.mark.parametrize("device", DEVICES)
def test_the_policy_decides_in_float32(device):
    """Its threshold is not rounded to the working precision, and its kernels are packed from it."""
    model = build(device)
    model.policy.threshold.fill_(0.1)
    fast = segblocks.compile(model, picture(device))
    engine = fast._engine
    assert engine.policy is not engine.scorer
    for part in (*engine.policy.parameters(), *engine.policy.buffers()):
        assert part.dtype != torch.float16
    assert float(engine.policy.threshold) == float(torch.tensor(0.1))
