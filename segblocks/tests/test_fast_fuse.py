"""Fused steps: which calls become one step, and that the steps say what the network says."""

import pytest
import torch
import torch.nn.functional as F
from agreement import TOLERANCE, distance, make_grid, make_image
from fast_networks import Net, SmallSwiftNet, relu_, up
from programs import check_fused, execute, record

from segblocks import BlockGrid, execute_with_grid
from segblocks.fast.cpu import CpuNetwork
from segblocks.fast.fuse import fuse
from segblocks.fast.portable import PortableNetwork
from segblocks.fast.steps import ConvStep


def block(net, x, down=None):
    """A basic block as torchvision writes it."""
    out = relu_(net.norm(net.strided(x) if down else net.conv(x)))
    out = net.other_norm(net.second(out))
    out += down(x) if down else x
    return relu_(out)


def shortcut_first(net, x):
    shortcut = net.third_norm(net.down(x))
    return relu_(shortcut + net.other_norm(net.second(relu_(net.strided(x)))))


FUSED = {
    "conv": (lambda n, x: n.second(x), ["3x3"]),
    "conv without bias": (lambda n, x: n.conv(x), ["3x3"]),
    "stride 2": (lambda n, x: n.strided(x), ["3x3/2"]),
    "point": (lambda n, x: n.point(x), ["1x1"]),
    "bn": (lambda n, x: n.norm(n.conv(x)), ["3x3"]),
    "bn without affine": (lambda n, x: n.plain_norm(n.conv(x)), ["3x3"]),
    "bn, relu": (lambda n, x: relu_(n.norm(n.second(x))), ["3x3 relu"]),
    "relu method": (lambda n, x: n.conv(x).relu(), ["3x3 relu"]),
    "relu_ method": (lambda n, x: n.conv(x).relu_(), ["3x3 relu"]),
    "residual": (block, ["3x3 relu", "3x3 residual relu"]),
    "torch.add": (lambda n, x: torch.add(n.conv(x), x), ["3x3 residual"]),
    "add to the left": (lambda n, x: x + n.conv(x), ["3x3 residual"]),
    "add_": (lambda n, x: n.conv(x).add_(x), ["3x3 residual"]),
    "add in place of the shortcut": (
        lambda n, x: n.point(x.add_(n.conv(x))),
        ["3x3 residual", "1x1"],
    ),
    "shortcut": (
        lambda n, x: block(n, x, lambda x: n.third_norm(n.down(x))),
        ["3x3/2 relu", "3x3 extra relu"],
    ),
    "shortcut without bn": (
        lambda n, x: n.conv(x) + n.point(x),
        ["3x3 extra"],
    ),
    "shortcut computed first": (shortcut_first, ["3x3/2 relu", "3x3 extra relu"]),
    "enlarged": (lambda n, x: n.point(x) + up(n.strided(x)), ["3x3/2", "1x1 enlarged"]),
    "enlarged by size": (
        lambda n, x: F.interpolate(n.strided(x), size=x.shape[2:], mode="bilinear") + n.conv(x),
        ["3x3/2", "3x3 enlarged"],
    ),
    "bn, relu before": (
        lambda n, x: (n.point(relu_(n.norm(x))), x),
        ["pre 1x1"],
    ),
    "before, bn and relu after": (
        lambda n, x: relu_(n.other_norm(n.point(relu_(n.norm(x))))) + x,
        ["pre 1x1 relu", "add"],
    ),
    "after": (
        lambda n, x: relu_(n.norm(n.point(x) + up(n.strided(x)))),
        ["3x3/2", "1x1 enlarged post"],
    ),
    "relu, then after": (
        lambda n, x: relu_(n.norm(relu_(n.conv(x) + x))),
        ["3x3 residual relu post"],
    ),
    "bn folded, bn after": (
        lambda n, x: relu_(n.norm(n.other_norm(n.conv(x)))),
        ["3x3 post"],
    ),
    "depthwise": (lambda n, x: n.each(x), ["depthwise 3x3"]),
    "depthwise, bn, relu6": (
        lambda n, x: F.relu6(n.norm(n.each_strided(x))),
        ["depthwise 5x5/2 relu below 6"],
    ),
    "depthwise, read around": (
        lambda n, x: n.second(relu_(n.each(x))),
        ["depthwise 3x3 relu", "3x3"],
    ),
    "relu6": (lambda n, x: F.relu6(n.norm(n.conv(x))), ["3x3 relu below 6"]),
    "hardtanh": (lambda n, x: F.hardtanh(n.conv(x), 0, 0.5), ["3x3 relu below 0.5"]),
    "clamp": (lambda n, x: n.conv(x).clamp(0, 2), ["3x3 relu below 2"]),
    "clamp_ from below": (lambda n, x: n.conv(x).clamp_(min=0), ["3x3 relu"]),
    "hardtanh from -1": (lambda n, x: F.hardtanh(n.conv(x)), ["3x3", "hardtanh"]),
    "clamp from above": (lambda n, x: n.conv(x).clamp(max=1), ["3x3", "clamp"]),
    "clamp by a tensor": (
        lambda n, x: n.conv(x).clamp(0, n.ceiling),
        ["3x3", "clamp"],
    ),
    "few channels": (
        lambda n, x: n.more(F.relu6(n.few_wide(relu_(n.few(x))))),
        ["1x1 relu", "3x3 relu below 6", "1x1"],
    ),
    "classes": (lambda n, x: n.last(relu_(n.norm(n.conv(x)))), ["3x3 relu", "1x1"]),
}


@pytest.mark.parametrize("name", FUSED)
def test_becomes_these_steps(name):
    function, expected = FUSED[name]
    assert check_fused(Net(function).eval(), 8) == ["conv2d", *expected]


def test_legacy_resizing_stays_legacy():
    net = Net(FUSED["after"][0]).eval()
    mask = make_grid("mixed")
    image = make_image(mask, 3, 8)
    grid = BlockGrid.from_mask(mask, legacy_upsample=True)
    program = record(net, image, mask)
    with torch.no_grad():
        expected = execute_with_grid(net, image, grid)
        steps = fuse(program)
        for run in (
            lambda *args: execute(program, steps, *args),
            PortableNetwork(program, steps).run,
            CpuNetwork(program, steps, tuple(mask.shape)).run,
        ):
            assert distance(run(image, grid), expected) < TOLERANCE


def test_parameters_stay_as_they_are():
    net = SmallSwiftNet().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    check_fused(net, 32)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_half_precision_is_folded_in_single():
    net = Net(FUSED["bn, relu"][0]).eval().half()
    mask = make_grid("mixed")
    program = record(net, make_image(mask, 3, 8).half(), mask)
    (step,) = (s for s in fuse(program) if isinstance(s, ConvStep))
    assert step.weight.dtype == step.bias.dtype == torch.float32
    scale = net.norm.weight.float() * (net.norm.running_var.float() + net.norm.eps).rsqrt()
    shift = net.norm.bias.float() - net.norm.running_mean.float() * scale
    expected = net.second.weight.float() * scale.view(-1, 1, 1, 1)
    assert torch.allclose(step.weight, expected, rtol=1e-5)
    assert torch.allclose(step.bias, net.second.bias.float() * scale + shift, rtol=1e-4, atol=1e-6)
