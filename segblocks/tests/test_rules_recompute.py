"""Windowed operations in training: exact gradients, without keeping the padded copy."""

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, make_grid, make_image
from torch import nn
from torch.autograd import gradcheck

from segblocks import BlockGrid, to_blocks
from segblocks.rules import recompute

WINDOWS = {
    "3x3": {"padding": 1},
    "3x3 stride 2": {"padding": 1, "stride": 2},
    "dilation": {"padding": 2, "dilation": 2},
    "depthwise": {"padding": 1, "groups": 4},
}


def blocks(kind="mixed", channels=4, block=4, dtype=torch.float64, shape=(1, 2, 2)):
    mask = make_grid(kind, shape)
    return to_blocks(make_image(mask, channels, block, dtype=dtype), mask)


def on_pixels(like, function):
    """`function` of blocks as a function of their pixel buffer."""
    return lambda pixels, *rest: function(like.like(pixels), *rest).pixels


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", WINDOWS)
def test_gradients_of_a_convolution(kind, name):
    x, settings = blocks(kind, block=8 if "stride" in name else 4), WINDOWS[name]
    weight = torch.randn(4, 4 // settings.get("groups", 1), 3, 3, dtype=torch.float64)
    inputs = [x.pixels, weight, torch.randn(4, dtype=torch.float64)]
    inputs = [t.clone().requires_grad_() for t in inputs]
    conv = on_pixels(x, lambda x, weight, bias: F.conv2d(x, weight, bias, **settings))
    assert gradcheck(conv, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("settings", [(3, 2, 1), (2,), (3, 1, 1)], ids=str)
def test_gradients_of_max_pooling(kind, settings):
    x = blocks(kind, 2, 8)
    pool = on_pixels(x, lambda x: F.max_pool2d(x, *settings))
    assert gradcheck(pool, [x.pixels.clone().requires_grad_()], fast_mode=True)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_gradients_of_some_arguments_alone(wanted):
    x = blocks("mixed")
    inputs = [x.pixels, torch.randn(4, 4, 3, 3).double(), torch.randn(4).double()]
    conv = on_pixels(x, lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1))
    every = [t.clone().requires_grad_() for t in inputs]
    some = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    for leaves in (every, some):
        conv(*leaves).square().sum().backward()
    for i, leaf in enumerate(some):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, every[i].grad)


def _saved(function, *inputs):
    """Elements that autograd keeps for the backward pass, beyond the inputs' own."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(*inputs)
    for t in inputs:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values()), out


def test_the_padded_copy_is_not_kept():
    x = blocks("mixed", 8, 16, torch.float32)
    pixels, weight = x.pixels.clone().requires_grad_(), torch.randn(8, 8, 3, 3).requires_grad_()
    conv = on_pixels(x, lambda x, weight: F.conv2d(x, weight, None, 1, 1))
    kept, _ = _saved(conv, pixels, weight)
    assert kept == 0
    pool = on_pixels(x, lambda x: F.max_pool2d(x, 3, 2, 1))
    kept, out = _saved(pool, pixels)
    assert kept == out.numel()  # a byte each, where a dense image keeps indices of eight


@pytest.mark.parametrize("operation", ["conv2d", "max_pool2d"])
def test_a_second_derivative_raises(operation):
    x = blocks()
    pixels = x.pixels.clone().requires_grad_()
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    if operation == "conv2d":
        out = F.conv2d(x.like(pixels), weight, None, 1, 1).pixels
    else:
        out = F.max_pool2d(x.like(pixels), 2).pixels
    (grad,) = torch.autograd.grad(out.square().sum(), pixels, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative through blocks"):
        grad.sum().backward()


def test_a_second_derivative_in_the_weight_alone_raises():
    """The gradient that enters, of a sum, does not require one itself."""
    x, weight = blocks(), torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    pixels = x.pixels.clone().requires_grad_()
    out = F.conv2d(x.like(pixels), weight, None, 1, 1).pixels
    (grad,) = torch.autograd.grad(out.sum(), pixels, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative through blocks"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_for_a_dense_convolution(dtype):
    conv = nn.Conv2d(4, 6, 3, padding=1)
    x = blocks("all", 4, 8, torch.float32)
    dense = x.combine().clone().requires_grad_()
    x.pixels.requires_grad_()
    with torch.autocast("cpu", dtype):
        expected = conv(dense)
        out = conv(x)
    assert out.dtype == expected.dtype == dtype
    assert torch.allclose(out.combine(), expected, atol=2e-2)
    expected.float().square().sum().backward()
    theirs = conv.weight.grad.clone()
    conv.zero_grad()
    out.combine().float().square().sum().backward()
    assert conv.weight.grad.dtype == x.pixels.grad.dtype == torch.float32
    assert torch.allclose(conv.weight.grad, theirs, rtol=5e-2, atol=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(dtype):
    conv = nn.Conv2d(4, 6, 3, 2, 1).double()
    x = blocks("mixed", 4, 8, torch.float64)
    expected = conv(x).pixels
    out = conv.to(dtype)(x.like(x.pixels.to(dtype))).pixels
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() < 5e-2
    out.float().sum().backward()
    assert conv.weight.grad.dtype == dtype


def test_a_device_without_autocast():
    mask = make_grid("mixed").to("meta")
    x = to_blocks(torch.empty(2, 4, 16, 24, device="meta"), BlockGrid.from_mask(mask, n_high=5))
    out = F.max_pool2d(F.conv2d(x, torch.empty(6, 4, 3, 3, device="meta"), None, 1, 1), 2)
    assert tuple(out.shape) == (2, 6, 8, 12)


def test_an_input_changed_in_place_is_noticed():
    x = blocks()
    pixels = x.pixels.clone().requires_grad_() * 1
    out = F.conv2d(x.like(pixels), torch.ones(4, 4, 3, 3).double().requires_grad_(), None, 1, 1)
    pixels.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.pixels.sum().backward()


def test_function_transforms_take_the_general_way():
    x = blocks()
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)

    def loss(weight):
        return F.conv2d(x, weight, None, 1, 1).pixels.square().sum()

    leaf = weight.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.allclose(torch.func.grad(loss)(weight), leaf.grad)


@pytest.fixture
def _as_with_cudnn(monkeypatch):
    """The way that CUDA takes, with PyTorch's CPU convolution in cuDNN's place."""

    def into(target, blocks, weight, *window):
        target.copy_(F.conv2d(blocks, weight, None, *window))

    monkeypatch.setattr(recompute, "takes_cudnn", lambda pixels, groups: groups == 1)
    monkeypatch.setattr(recompute, "convolve_into", into)


@pytest.mark.usefixtures("_as_with_cudnn")
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(
    ("kernel", "settings"),
    [
        ((3, 3), {"padding": 1}),
        ((3, 3), {"padding": 1, "stride": 2}),
        ((3, 3), {"padding": 2, "dilation": 2}),
        ((5, 1), {"padding": (2, 0)}),
        ((4, 2), {"padding": "same"}),
        ((1, 1), {"stride": 2}),
    ],
    ids=str,
)
def test_gradients_as_with_cudnn(kind, kernel, settings):
    x = blocks(kind, 3, 8)
    inputs = [x.pixels, torch.randn(5, 3, *kernel).double(), torch.randn(5).double()]
    inputs = [t.clone().requires_grad_() for t in inputs]
    conv = on_pixels(x, lambda x, weight, bias: F.conv2d(x, weight, bias, **settings))
    assert gradcheck(conv, inputs, fast_mode=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [(3, 1, 1), (3, 2, 1), (7, 2, 3), (1, 2, 0)], ids=str)
def test_cudnn_equals_the_cpu(kind, dtype, settings, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    kernel, stride, padding = settings
    x = blocks(kind, 8, 16)
    weight = torch.randn(16, 8, kernel, kernel, dtype=torch.float64) / kernel
    bias = torch.randn(16, dtype=torch.float64)
    runs = []
    for device, precision in (("cpu", torch.float64), ("cuda", dtype)):
        leaves = [
            t.to(dtype).to(device, precision, copy=True).requires_grad_()
            for t in (x.pixels, weight, bias)
        ]
        there = to_blocks(x.combine().to(device), x.grid.mask.to(device))
        pixels, *parameters = leaves
        out = F.max_pool2d(F.conv2d(there.like(pixels), *parameters, stride, padding), 2).pixels
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        (out * weights.to(dtype).to(out)).sum().backward()
        runs.append([out, *(leaf.grad for leaf in leaves)])
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 5e-2)
    for expected, found in zip(*runs):
        error = (found.double().cpu() - expected).abs()
        assert error.mean() <= tolerance * expected.abs().mean()
