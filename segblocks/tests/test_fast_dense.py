"""Dense excursions: what of a `no_blocks` function becomes one step, and that it says the same."""

import networks
import pytest
import torch
import torch.nn.functional as F
from agreement import distance, make_grid, make_image
from fast_networks import Net, SmallSwiftNet, relu_
from torch import nn

from segblocks import BlockGrid, execute_with_grid, no_blocks
from segblocks.fast.dense_fuse import CallStep, PooledStep
from segblocks.fast.dense_run import DenseFunction
from segblocks.fast.dense_trace import record_dense
from segblocks.fast.network import build_network
from segblocks.fast.small_conv import SmallConv

SIZE = (1, 16, 12, 20)


class Layers(nn.Module):
    """What the functions below are made of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.wide_norm = nn.BatchNorm2d(16), nn.BatchNorm2d(48)
        self.point, self.level = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 5, 1)
        self.fuse = nn.Conv2d(48, 12, 1)
        self.odd = nn.Conv2d(26, 8, 1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        networks.settle(self)
        self.requires_grad_(False)


def pyramid(n, x):
    """As SwiftNet has it."""
    x = n.point(F.relu(n.norm(x)))
    levels = [x]
    for bins in (4, 2):
        pooled = F.adaptive_avg_pool2d(x, (bins, bins))
        levels.append(up(n.level(pooled), x))
    return n.odd(torch.cat(levels, 1))


def up(x, like):
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def aspp(n, x):
    """As DeepLab has it, with in-place functions and a branch from the whole picture."""
    whole = up(relu_(n.norm(n.point(F.adaptive_avg_pool2d(x, 1)))), x)
    branches = [relu_(n.norm(n.point(x))), n.conv(x), whole]
    return n.fuse(torch.cat(branches, dim=1))


def gate(n, x):
    return x * torch.sigmoid(n.point(F.adaptive_avg_pool2d(x, 1)))


def weights_made_of_shapes(n, x):
    rows = torch.arange(x.shape[2], device=x.device).to(x.dtype) / x.shape[2]
    return n.point(x) * rows.view(1, 1, -1, 1) + n.norm.weight.view(-1, 1, 1) * 2


DENSE = {
    "pyramid": (pyramid, ["pre point 1", "pooled 4x4 2x2", "point 3"]),
    "average pooling": (
        lambda n, x: n.level(F.relu(n.norm(F.avg_pool2d(x, (3, 5))))),
        ["pooled 4x4"],
    ),
    "aspp": (aspp, ["pooled 1x1", "point 1", "conv2d", "point 3"]),
    "gate": (gate, ["pooled 1x1", "sigmoid", "mul"]),
    "five maps": (
        lambda n, x: n.fuse(torch.cat((x[:, :8], x[:, :8], x[:, 8:], x[:, 8:], x), 1)),
        ["getitem"] * 4 + ["cat", "point 1"],
    ),
    "pooled twice": (
        lambda n, x: up(pooled := F.adaptive_avg_pool2d(x, 2), x) + up(n.point(pooled), x),
        ["adaptive_avg_pool2d", "interpolate", "point 1", "interpolate", "add"],
    ),
    "pooled with a remainder": (
        lambda n, x: n.point(F.avg_pool2d(x, 7)),
        ["avg_pool2d", "point 1"],
    ),
    "resized after pooling": (
        lambda n, x: n.point(up(F.adaptive_avg_pool2d(x, 3), x)),
        ["adaptive_avg_pool2d", "point 1"],
    ),
    "resized by a factor": (
        lambda n, x: n.point(F.interpolate(x, None, 2, "bilinear")),
        ["point 1"],
    ),
    "aligned corners": (
        lambda n, x: n.point(F.interpolate(x, (6, 10), None, "bilinear", True)),
        ["interpolate", "point 1"],
    ),
    "nearest": (lambda n, x: n.point(F.interpolate(x, (6, 10))), ["interpolate", "point 1"]),
    "joined along height": (
        lambda n, x: n.point(torch.cat((x, x), 2)),
        ["cat", "point 1"],
    ),
    "bn after, then before": (
        lambda n, x: n.point(F.relu(n.norm(F.relu(n.norm(n.point(x)))))),
        ["point 1", "pre point 1"],
    ),
    "bn read twice": (
        lambda n, x: n.point(F.relu(y := n.norm(x))) + y,
        ["batch_norm", "relu", "point 1", "add"],
    ),
    "chunks": (
        lambda n, x: torch.cat(tuple(reversed(n.point(x).chunk(2, 1))), 1),
        ["point 1", "chunk", "cat"],
    ),
    "the input itself": (lambda n, x: x, []),
    "constants": (weights_made_of_shapes, ["point 1", "mul", "add"]),
    "training bn": (
        lambda n, x: n.point(F.relu(F.batch_norm(x, None, None, training=True))),
        ["batch_norm", "relu", "point 1"],
    ),
    "stride": (lambda n, x: F.conv2d(x, n.point.weight, None, 2), ["conv2d"]),
    "weights of a value": (
        lambda n, x: F.conv2d(x, x.mean((0, 2, 3)).view(1, 16, 1, 1)),
        ["mean", "view", "conv2d"],
    ),
}


def describe(step) -> str:
    if isinstance(step, CallStep):
        return step.node.name.strip("_")
    if isinstance(step, PooledStep):
        return " ".join(
            ["pooled"] + [f"{rows}x{columns}" for rows, columns in (x.size for x in step.levels)]
        )
    return "pre " * (step.pre is not None) + f"point {len(step.sources)}"


def record(function, *more, size=SIZE):
    net = Layers()
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    example = torch.zeros(size, dtype=torch.float64)
    return net, record_dense(lambda x: function(net, x), example, own)


@pytest.mark.parametrize("name", DENSE)
def test_becomes_these_steps(name):
    function, expected = DENSE[name]
    net, program = record(function)
    dense = DenseFunction(program, kernels=False)
    assert [describe(step) for step in dense.steps] == expected
    for seed in range(2):
        x = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        before = x.clone()
        wanted = function(net, x.clone())
        for _ in range(2):
            assert distance(dense(x), wanted) < 1e-10
        assert torch.equal(x, before), "the input changed"


def decides_by_value(n, x):
    return n.point(x) if x.sum() > 0 else x


def reads_a_value(n, x):
    return n.point(x) * float(x.max())


def writes_through_a_view(n, x):
    y = n.point(x)
    y[:, :4].relu_()
    return y


def writes_an_element(n, x):
    y = n.point(x)
    y[:, 0] = 0
    return y


def writes_what_a_view_sees(n, x):
    y = n.point(x)
    z = y.flatten(2)
    y.relu_()
    return y + z.view_as(y)


def takes_a_tensor_from_elsewhere(n, x):
    return x + _ELSEWHERE


def goes_through_numpy(n, x):
    return x * torch.from_numpy(x.numpy())


def returns_two(n, x):
    return x, n.point(x)


_ELSEWHERE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [
        decides_by_value,
        reads_a_value,
        writes_through_a_view,
        writes_an_element,
        writes_what_a_view_sees,
        takes_a_tensor_from_elsewhere,
        goes_through_numpy,
        returns_two,
    ],
)
def test_is_not_recorded(function):
    assert record(function)[1] is None


def test_draws_again_at_every_run():
    _, program = record(lambda n, x: n.point(x) + torch.rand(1, dtype=x.dtype))
    dense, x = DenseFunction(program, kernels=False), torch.zeros(SIZE, dtype=torch.float64)
    assert not torch.equal(dense(x), dense(x))


class Two(nn.Module):
    """A network with an excursion that can be fused and one that decides by value."""

    def __init__(self):
        super().__init__()
        self.net = Net(None).double()
        self.layers = Layers()
        self.narrow, self.wide = nn.Conv2d(64, 16, 1).double(), nn.Conv2d(16, 64, 1).double()

    def forward(self, image):
        x = self.narrow(self.net.first(image))
        x = no_blocks(lambda x: aspp(self.layers, x).repeat(1, 2, 1, 1)[:, :16])(x)
        return self.wide(no_blocks(lambda x: decides_by_value(self.layers, x))(x))


def test_weights_are_packed_in_the_order_in_which_they_are_read():
    """Chunks of 32 input channels: taps outermost, the channels of each map rounded up to 32."""
    parts, cout = (40, 8, 32), 70
    weight = torch.randn(cout, sum(parts), 3, 3)
    packed = SmallConv.pack(weight, torch.randn(cout), torch.float16, parts)
    assert packed.weights.shape == (9 * 4, 128, 32)
    maps = torch.randn(sum(parts), 3, 3).split(parts)
    wide = torch.cat([F.pad(x, (0, 0, 0, 0, 0, -x.shape[0] % 32)) for x in maps])  # 128,3,3
    read = wide.permute(1, 2, 0).reshape(9 * 4, 32)
    found = torch.einsum("koi,ki->o", packed.weights.double(), read.double())
    expected = F.conv2d(torch.cat(maps)[None].double(), weight.half().double()).flatten()
    assert distance(found[:cout], expected) < 1e-10
    assert not found[cout:].any()


@pytest.mark.parametrize("net", [SmallSwiftNet, Two])
def test_networks_say_the_same(net):
    net, mask = net().eval().requires_grad_(False), make_grid("mixed")
    block = 32
    run, how = build_network(net, make_image(mask, 3, block), tuple(mask.shape), False)
    assert how == "fused"
    for kind in ("mixed", "none", "all"):
        mask = make_grid(kind, seed=2)
        image, grid = make_image(mask, 3, block, seed=4), BlockGrid.from_mask(mask)
        with torch.inference_mode():
            assert distance(run(image, grid), execute_with_grid(net, image, grid)) < 1e-9
