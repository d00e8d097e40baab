"""Batch norm in training that what follows joins: as step by step, and launched as meant.

On the CPU the operations' PyTorch references stand for the kernels.
"""

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, make_grid, make_image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, conv1x1

from segblocks import execute_with_grid, no_blocks, to_blocks
from segblocks.rules import norm_gradients, normalised, setting
from segblocks.rules.normalised import Normalised

CHANNELS = 4


@pytest.fixture
def launched(monkeypatch):
    """The way of CUDA; names of what was launched, in order."""
    names = []

    def note(module, name):
        function = getattr(module, name)

        def noted(*args):
            names.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, noted)

    monkeypatch.setattr(normalised, "takes_kernels", lambda pixels: True)
    note(normalised, "batch_statistics")
    note(norm_gradients, "batch_normalise")
    note(norm_gradients, "batch_gradients")
    note(setting, "blockpad_normalised")
    return names


class SmallNet(nn.Module):
    """Residual blocks, and convolutions behind batch norm and ReLU as in SwiftNet's decoder."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8))
        down = nn.Sequential(conv1x1(8, 12, 2), nn.BatchNorm2d(12))
        self.blocks = nn.ModuleList((BasicBlock(8, 8), BasicBlock(8, 12, 2, down)))
        self.norms = nn.ModuleList((nn.BatchNorm2d(12), nn.BatchNorm2d(8)))
        self.narrow = nn.ModuleList((nn.Conv2d(12, 8, 1), nn.Conv2d(8, 5, 3, 1, 1)))

    def forward(self, image):
        x = F.max_pool2d(F.relu(self.stem(image), inplace=True), 3, 2, 1)
        skip = self.blocks[0](x)
        x = self.narrow[0](F.relu(self.norms[0](self.blocks[1](skip))))
        x = F.interpolate(x, scale_factor=2, mode="bilinear") + skip
        return self.narrow[1](F.relu(self.norms[1](x)))


class Bench(nn.Module):
    """Layers for `SEQUENCES`, in float64."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.BatchNorm2d(CHANNELS, momentum=0.3) for _ in range(2))
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1)
        self.strided = nn.Conv2d(CHANNELS, 6, 3, 2, 1, bias=False)
        self.narrow = nn.Conv2d(CHANNELS, 5, 1)
        for norm in (self.first, self.second):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.double()


def relu_conv(net, x):
    return net.conv(F.relu(net.first(x), inplace=True))


def two_convolutions(net, x):
    y = F.relu_(net.first(x))
    return net.conv(y).combine().sum() + net.strided(y).combine().square().sum()


def narrow(net, x):
    return net.narrow(F.relu(net.first(x)))


def residual(net, x):
    y = net.first(x)
    y += net.second(x)
    y = F.relu(y, inplace=True)
    return net.conv(y) + y


def out_of_place(net, x):
    y = net.first(x)
    z = y + x
    return net.conv(y) + net.conv(z) + F.relu(y) + x.add(y)


def alone(net, x):
    return net.first(x)


def two_holders(net, x):
    y = net.first(x)
    held = y.like(y._value)
    F.relu_(y)
    return net.conv(held) + y


def convolution_before_the_relu(net, x):
    y = net.first(x)
    before = net.conv(y)
    return before + F.relu(y)


def read_first(net, x):
    y = F.relu(net.first(x))
    return y * 2 + net.conv(y)


def chain(net, x):
    y = net.conv(F.relu(net.first(x), inplace=True))
    y = net.second(y).add_(x)
    return net.strided(y.relu_())


SEQUENCES = {
    # what is launched forward, in order, besides statistics; how many batch norms go backward
    relu_conv: ("blockpad_normalised", 1),
    two_convolutions: ("blockpad_normalised blockpad_normalised", 1),
    narrow: ("batch_normalise", 1),
    residual: ("batch_normalise batch_normalise", 2),
    out_of_place: (None, None),
    alone: ("batch_normalise", 1),
    two_holders: ("blockpad_normalised batch_normalise", 2),
    convolution_before_the_relu: ("blockpad_normalised batch_normalise", 2),
    read_first: ("batch_normalise", 1),
    chain: ("blockpad_normalised batch_normalise", 2),
}


def run(function, kind, learns=True):
    """The result, gradients of the image and of all parameters, running statistics."""
    torch.manual_seed(0)
    net, mask = Bench(), make_grid(kind)
    for p in net.parameters():
        p.requires_grad_(learns)
    leaf = make_image(mask, CHANNELS, 8).requires_grad_()
    out = function(net, to_blocks(leaf * 1, mask))
    out = out if isinstance(out, torch.Tensor) else out.combine().sin().sum()
    yield out
    out.backward()
    yield [leaf.grad, *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("function", SEQUENCES, ids=lambda f: f.__name__)
def test_equals_step_by_step(function, kind, monkeypatch, request):
    expected, rest = run(function, kind)
    names = request.getfixturevalue("launched")
    steps = run(function, kind)
    found = next(steps)
    forward, backward = SEQUENCES[function]
    if forward is not None:
        assert " ".join(n for n in names if n != "batch_statistics") == forward
    names.clear()
    mine = next(steps)
    if backward is not None:
        assert names.count("batch_gradients") == backward
    assert abs(found - expected) <= 1e-9 * abs(expected)
    for a, b in zip(mine, rest, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-8), float((a - b).abs().max())


def test_frozen_parameters(request):
    expected, rest = run(chain, "mixed", False)
    names = request.getfixturevalue("launched")
    found, mine = run(chain, "mixed", False)
    assert "blockpad_normalised" in names
    assert torch.allclose(found, expected)
    assert torch.allclose(mine[0], rest[0])
    assert all(g is None for g in mine[1:-6])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_without_parameters_or_statistics(launched, monkeypatch, affine, tracked):
    mask = make_grid("mixed")
    grads = []
    for way in (True, False):
        monkeypatch.setattr(normalised, "takes_kernels", lambda pixels, way=way: way)
        layer = nn.BatchNorm2d(4, affine=affine, track_running_stats=tracked).double()
        leaf = make_image(mask, 4).requires_grad_()
        out = F.relu(layer(to_blocks(leaf * 1, mask))).combine().sin().sum()
        grads.append(torch.autograd.grad(out, leaf)[0])
    assert launched.count("batch_normalise") == 1
    assert torch.allclose(*grads, atol=1e-10)


def blocks():
    mask = make_grid("mixed")
    x = to_blocks(make_image(mask, CHANNELS), mask)
    return x.like(x.stored.clone().requires_grad_() * 1)


@pytest.mark.usefixtures("launched")
def test_a_change_that_nobody_saw_raises():
    net, x = Bench(), blocks()
    pixels, y, z = x.stored, net.first(x), blocks()
    with torch.no_grad():
        pixels.add_(1)
    with pytest.raises(RuntimeError, match="changed in place before"):
        y.combine()
    with pytest.raises(RuntimeError, match="changed in place before"):
        net.conv(y)
    y, more = net.first(x), x.like(z.stored)
    y += more
    with torch.no_grad():
        more.stored.add_(1)
    with pytest.raises(RuntimeError, match="changed in place before"):
        y.combine()


def test_a_change_by_a_function_on_blocks_comes_after(launched):
    net, x = Bench(), blocks()
    y = net.first(x)
    before = x.stored.detach().clone()
    x.mul_(2)
    assert launched == ["batch_statistics", "batch_normalise"]
    expected = F.batch_norm(before, None, None, net.first.weight, net.first.bias, True)
    assert torch.allclose(y.stored, expected)


def test_a_flop_counter_sees_what_it_knows(launched):
    net, x = Bench(), blocks()
    with FlopCounterMode(display=False) as counter:
        relu_conv(net, x).combine().sum().backward()
    assert not launched
    rows = x.stored.shape[0]
    assert counter.get_total_flops() >= 3 * 2 * 9 * CHANNELS**2 * rows
    y = net.first(x)
    with FlopCounterMode(display=False):
        net.conv(y)
    assert launched == ["batch_statistics", "batch_normalise"]


def test_nothing_is_put_off_where_it_is_not_wanted(launched):
    net, x = Bench(), blocks()
    with torch.no_grad():
        net.first(x)
    net.first.eval()(x)
    frozen = net.first.train().requires_grad_(False)
    frozen(x.like(x.stored.detach()))
    x.grid.later.expose()
    net.second(x)
    assert not launched


def test_gradients_though_read_without(launched):
    net, x = Bench(), blocks()
    y = net.first(x)
    with torch.no_grad():
        assert not F.relu(y).requires_grad
    assert y.stored.requires_grad
    assert launched == ["batch_statistics", "batch_normalise"]


@pytest.mark.usefixtures("launched")
def test_autocast_of_another_type_is_read():
    net, x = Bench().float(), blocks()
    x = x.like(x.stored.detach().float().requires_grad_())
    y = net.first(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = net.conv(y)
    assert y._value.job is None
    assert out.dtype == torch.bfloat16
    y = net.first(x.like(x.stored.detach().bfloat16().requires_grad_()))
    with torch.autocast("cpu", torch.bfloat16):
        out = net.conv(y)
    assert y._value.job is not None
    out.stored.float().sum().backward()
    assert net.conv.weight.grad.dtype == net.first.weight.grad.dtype == torch.float32


@pytest.mark.usefixtures("launched")
def test_looks_like_pixels():
    net, x = Bench(), blocks()
    y = net.first(x)
    assert type(y._value) is Normalised
    assert y.requires_grad
    assert y.is_floating_point()
    assert (y.shape, y.dtype, y.device, y.is_cuda) == (x.shape, x.dtype, x.device, False)
    assert y._value.get_device() == -1
    assert y._value.read() is y.pixels


def test_memory_of_what_is_never_stored(launched):
    """Of bn, relu, conv the batch norm's input alone is kept, once."""
    net, x = Bench(), blocks()
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = relu_conv(net, x)
    assert "batch_normalise" not in launched
    large = [n for n in kept.values() if n >= x.stored.numel()]
    assert len(large) == 1
    out.stored.sum().backward()


@pytest.mark.parametrize("kind", GRIDS)
def test_a_network_trains_the_same(kind, launched, monkeypatch):
    results = []
    for way in (False, True):
        monkeypatch.setattr(normalised, "takes_kernels", lambda pixels, way=way: way)
        torch.manual_seed(0)
        net = SmallNet().double().train()
        optimiser = torch.optim.SGD(net.parameters(), 0.05)
        mask = make_grid(kind)
        image = make_image(mask, 3, 32)
        for _ in range(3):
            out = execute_with_grid(net, image, mask)
            loss = out.square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        results.append([loss, *net.state_dict().values()])
    assert launched
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-8)


def test_no_blocks_reads(launched):
    net, x = Bench(), blocks()
    out = no_blocks(lambda image: image * 2)(net.first(x))
    assert out.stored.requires_grad
    assert launched == ["batch_statistics", "batch_normalise"]


@pytest.mark.gpu
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", GRIDS)
def test_a_network_on_cuda(kind, half, monkeypatch):
    """One step with kernels and by PyTorch's batch norm, both against float64."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    seen, make = [], Normalised.prologue
    monkeypatch.setattr(Normalised, "prologue", lambda cell: seen.append(make(cell)) or seen[-1])
    takes, mask = normalised.takes_kernels, make_grid(kind)

    def step(dtype, half, kernels):
        monkeypatch.setattr(normalised, "takes_kernels", takes if kernels else lambda pixels: False)
        torch.manual_seed(0)
        net = SmallNet().to("cuda", dtype).train()
        image = make_image(mask, 3, 64).to("cuda", dtype)
        with torch.autocast("cuda", half, enabled=half is not None):
            out = execute_with_grid(net, image, mask.cuda())
        out.to(dtype).sin().sum().backward()
        buffers = [b for b in net.buffers() if b.is_floating_point()]
        return [t.detach().double() for t in (out, *(p.grad for p in net.parameters()), *buffers)]

    exact = step(torch.float64, None, False)
    plain, found = step(torch.float32, half, False), step(torch.float32, half, True)
    assert any(p is not None for p in seen)
    again = step(torch.float32, half, True)
    for a, b, c, d in zip(exact, plain, found, again):
        assert torch.equal(c, d) or not torch.backends.cudnn.deterministic
        error, theirs, scale = (c - a).norm(), (b - a).norm(), a.norm()
        # In half precision a pixel may pass a ReLU for one and not for the other.
        assert error <= 2 * theirs + (1e-5 if half is None else 0.1) * scale
