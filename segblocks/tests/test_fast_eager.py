"""Single convolutions on Hopper, outside a compiled model: one launch in place of the general way.

The general way, in float64, is what they are compared with.
"""

import copy
import threading
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, make_grid, make_image
from fast_models import ON_HOPPER
from torch import nn

from segblocks import to_blocks
from segblocks.fast import eager

pytestmark = [*ON_HOPPER, pytest.mark.usefixtures("poisoned_memory")]

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HALF = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Notes of convolutions in half precision whether the Hopper kernel did them."""
    counted, conv2d = [], eager.conv2d

    def count(x, *args):
        result = conv2d(x, *args)
        if x.dtype in TOLERANCE:
            counted.append(result is not None)
        return result

    monkeypatch.setattr(eager, "conv2d", count)
    return counted


def blocks(kind, channels, block, dtype, seed=0):
    mask = make_grid(kind)
    return to_blocks(make_image(mask, channels, block, seed).to("cuda", dtype), mask.cuda())


def layer(inputs, outputs, kernel, stride, bias, dtype):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    return conv.to("cuda", dtype).requires_grad_(False)


def check(conv, x):
    """The layer on blocks, and the general way in float64."""
    before = x.pixels.clone()
    found = conv(x)
    expected = copy.deepcopy(conv).double()(x.double())
    assert found.block == expected.block
    assert found.grid is x.grid
    assert found.dtype == x.dtype
    error = (found.pixels.double() - expected.pixels).abs().max()
    assert error <= TOLERANCE[x.dtype] * max(1.0, float(expected.pixels.abs().max()))
    assert torch.equal(x.pixels, before), "the input changed"
    return found


@HALF
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (128, 64), (64, 192), (512, 256)])
def test_equals_the_general_way(kind, kernel, stride, bias, inputs, outputs, dtype, taken):
    conv = layer(inputs, outputs, kernel, stride, bias, dtype)
    for block in (4, 16):
        check(conv, blocks(kind, inputs, block, dtype))
    assert taken == [True, True]


def test_large_maps(taken):
    check(layer(128, 128, 3, 1, True, torch.float16), blocks("mixed", 128, 128, torch.float16))
    assert taken == [True]


@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype", "options"),
    [
        (64, 48, torch.float16, {}),
        (48, 64, torch.float16, {}),
        (64, 64, torch.float32, {}),
        (64, 64, torch.float16, {"groups": 2}),
        (64, 64, torch.float16, {"dilation": 2, "padding": 2}),
        (64, 64, torch.float16, {"padding": "same"}),
    ],
)
def test_what_goes_the_general_way(inputs, outputs, dtype, options, taken):
    x = blocks("mixed", inputs, 16, dtype)
    options = {"padding": 1, **options}
    weight = torch.randn(outputs, inputs // options.get("groups", 1), 3, 3) / inputs**0.5
    weight = weight.to("cuda", dtype)
    found = F.conv2d(x, weight, **options)
    expected = F.conv2d(x.double(), weight.double(), **options)
    error = (found.pixels.double() - expected.pixels).abs().max()
    assert error <= 4e-3 * max(1.0, float(expected.pixels.abs().max()))
    assert True not in taken


def test_gradients_go_the_general_way(taken):
    """Whatever needs a gradient gets it: the weight, the bias alone, or the input."""
    for part in ("weight", "bias", "input"):
        conv = layer(64, 64, 3, 1, True, torch.float16)
        x = make_image(make_grid("mixed"), 64, 16).to("cuda", torch.float16)
        leaf = x.requires_grad_() if part == "input" else getattr(conv, part).requires_grad_()
        conv(to_blocks(x, make_grid("mixed").cuda())).pixels.float().sum().backward()
        assert leaf.grad is not None, part
        assert leaf.grad.abs().max() > 0
    assert True not in taken


def test_weights_that_change_are_noticed(taken):
    x = blocks("mixed", 64, 16, torch.float16)
    conv = layer(64, 64, 3, 1, True, torch.float16)
    first = check(conv, x).pixels
    with torch.no_grad():
        conv.weight.mul_(2)
    second = check(conv, x).pixels
    with torch.no_grad():
        conv.bias.add_(1)
    third = check(conv, x).pixels
    conv.load_state_dict(layer(64, 64, 3, 1, True, torch.float16).state_dict())
    fourth = check(conv, x).pixels
    results = [first, second, third, fourth]
    assert not any(torch.equal(a, b) for a, b in pairwise(results))
    assert taken == [True] * 4


def test_parameters_that_are_exchanged_are_noticed(taken):
    """`Module.to` keeps the parameter object and its version, and gives it other data."""
    conv = layer(64, 64, 3, 1, True, torch.float16)
    check(conv, blocks("mixed", 64, 16, torch.float16))
    conv.bfloat16()
    check(conv, blocks("mixed", 64, 16, torch.bfloat16))
    conv.weight.data = conv.weight.data * 2
    check(conv, blocks("mixed", 64, 16, torch.bfloat16))
    conv.bias.data = conv.bias.data + 1
    check(conv, blocks("mixed", 64, 16, torch.bfloat16))
    conv.bias = None
    check(conv, blocks("mixed", 64, 16, torch.bfloat16))
    assert taken == [True] * 5


def test_weights_made_in_inference_mode_may_change_too(taken):
    """They do not count their changes, so nothing is kept of them: they go the general way."""
    with torch.inference_mode():
        conv = layer(64, 64, 3, 1, True, torch.float16)
        x = blocks("mixed", 64, 16, torch.float16)
        check(conv, x)
        conv.weight.mul_(2)
        check(conv, x)
    assert taken == [False, False]


def test_repeats_bit_for_bit_and_never_waits(taken):
    x = blocks("mixed", 256, 32, torch.float16)
    conv = layer(256, 256, 3, 1, True, torch.float16)
    first = conv(x).pixels
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [conv(x).pixels for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(pixels, first) for pixels in again)
    assert taken == [True] * 11


def test_several_grids_keep_their_own_tables(taken):
    conv = layer(64, 64, 3, 1, False, torch.float16)
    images = [blocks(kind, 64, 16, torch.float16) for kind in GRIDS]
    for _ in range(2):
        for x in images:
            check(conv, x)
    assert taken == [True] * 8


@HALF
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("channels", [8, 64])
def test_max_pooling_equals_the_general_way(kind, channels, dtype):
    for block in (4, 32):
        x = blocks(kind, channels, block, dtype)
        before = x.pixels.clone()
        found = F.max_pool2d(x, 3, 2, 1)
        expected = F.max_pool2d(x.double(), 3, 2, 1)
        assert eager.max_pool2d(x) is not None
        assert found.dtype == dtype
        error = (found.pixels.double() - expected.pixels).abs().max()
        assert error <= TOLERANCE[dtype] * max(1.0, float(expected.pixels.abs().max()))
        assert torch.equal(x.pixels, before), "the input changed"


def test_max_pooling_keeps_nan():
    x = blocks("mixed", 64, 8, torch.float16)
    x.pixels[::7] = torch.nan
    found, expected = F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x.double(), 3, 2, 1)
    assert torch.equal(found.pixels.isnan(), expected.pixels.isnan())


@pytest.mark.parametrize("settings", [(2,), (3, 1, 1), (2, 2, 0, 1, True)], ids=str)
def test_other_poolings_go_the_general_way(settings):
    x = blocks("mixed", 64, 16, torch.float16)
    found, expected = F.max_pool2d(x, *settings), F.max_pool2d(x.double(), *settings)
    assert (
        found.pixels.double() - expected.pixels
    ).abs().max() < 2e-3 * expected.pixels.abs().max()


def test_a_thread_that_has_not_used_cuda_yet(monkeypatch):
    # Filling would be the thread's first use of CUDA.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    conv, x = layer(64, 64, 3, 1, True, torch.float16), blocks("mixed", 64, 16, torch.float16)
    expected, found = conv(x).pixels, []
    thread = threading.Thread(target=lambda: found.append(conv(x).pixels))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


class Layers(nn.Module):
    """A residual block, a pooling and a step of a decoder that normalises first."""

    def __init__(self, channels, wide):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, wide, 3, 2, 1), nn.BatchNorm2d(wide)
        self.conv2, self.norm2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, wide, 1, 2), nn.BatchNorm2d(wide))
        self.before, self.single = nn.BatchNorm2d(channels), nn.Conv2d(channels, wide, 1)
        self.last = nn.Conv2d(wide, wide, 3, 1, 1)

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.before(x)), 3, 2, 1)
        y = self.single(y)
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        skip = F.relu(out, inplace=True)
        enlarged = F.interpolate(skip, scale_factor=2, mode="bilinear")
        x = self.single(F.relu(self.before(x))) + enlarged
        x = self.last(F.relu(self.norm1(x)))
        return self.last(skip), self.last(y), skip, self.last(x)


def network(dtype, channels=64, wide=128, statistics=None):
    net = Layers(channels, wide).eval().to("cuda", dtype).requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.normal_(layer.weight, 1, 0.2)
            nn.init.normal_(layer.bias, std=0.3)
            layer.to(statistics or dtype)
    return net


@HALF
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("statistics", [None, torch.float32])
def test_what_follows_a_convolution_is_done_with_it(kind, statistics, dtype):
    """Batch norm, sum, ReLU and averages in the launch, against the general way in float64."""
    net = network(dtype, statistics=statistics)
    for block in (8, 32):
        x = blocks(kind, 64, block, dtype)
        double = to_blocks(x.combine().double(), x.grid.mask)
        double = double.like(x.stored.double())
        for found, expected in zip(net(x), copy.deepcopy(net).double()(double)):
            bound = 4 * TOLERANCE[dtype] * max(1.0, float(expected.pixels.abs().max()))
            assert (found.stored.double() - expected.pixels).abs().max() <= bound
            assert torch.equal(found.stored, found.pixels)


def test_what_is_put_off_repeats_what_is_done_at_once():
    """Up to the rounding of what is not stored in between."""
    net = network(torch.float16)
    x = blocks("mixed", 64, 32, torch.float16)
    late = [y.combine() for y in net(x)]
    x.pixels  # noqa: B018 - from here on nothing is put off
    at_once = [y.combine() for y in net(x)]
    for a, b in zip(late, at_once):
        assert (a - b).float().abs().max() <= 1e-2 * b.float().abs().max()


def test_averages_are_made_anew_after_a_change_in_place():
    conv = layer(64, 64, 3, 1, False, torch.float16)
    x = conv(blocks("mixed", 64, 16, torch.float16))
    first = conv(x).combine()  # x has been computed with averages behind it
    x.mul_(-1)
    second = conv(x).combine()
    # The first averages are of pixels not yet rounded, the second of those that are stored.
    assert (second + first).float().abs().max() <= 1e-2 * first.float().abs().max()


def test_a_residual_that_is_nan_stays_nan():
    x = blocks("mixed", 64, 8, torch.float16)
    other = x.like(torch.full_like(x.stored, torch.nan))
    conv = layer(64, 64, 3, 1, False, torch.float16)
    assert F.relu(conv(x) + other).stored.isnan().all()
    norm = nn.BatchNorm2d(64).eval().to("cuda", torch.float16).requires_grad_(False)
    assert F.relu(norm(other)).stored.isnan().all()


@pytest.mark.parametrize("other", [False, True], ids=["from the default stream", "from another"])
def test_read_on_another_stream(other):
    """With the device far behind the host, as it may be: nothing runs before what it needs."""
    net = network(torch.float16)
    expected = [y.combine() for y in net(blocks("mixed", 64, 32, torch.float16))]
    side, x = torch.cuda.Stream(), blocks("mixed", 64, 32, torch.float16)
    own = torch.cuda.Stream() if other else torch.cuda.default_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(own):
        torch.cuda._sleep(10**8)  # cycles
        late = net(x)
    side.wait_stream(own)
    with torch.cuda.stream(side):
        found = [y.combine() for y in late]
    side.synchronize()
    for a, b in zip(found, expected):
        assert torch.equal(a, b)


def test_captured_in_a_graph():
    """Outside `execute_with_grid` nothing is put off in a capture, so that sums and activations
    start from what was stored, which is rounded."""
    net, x = network(torch.float16), blocks("mixed", 64, 32, torch.float16)
    expected = [y.combine() for y in net(x)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        [y.combine() for y in net(x)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [y.combine() for y in net(x)]
    for _ in range(2):
        for a in found:
            a.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(found, expected):
            assert (a - b).float().abs().max() <= 1e-2 * b.float().abs().max()


@HALF
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_the_first_convolution_reads_the_image(size, block, kind, dtype, taken):
    mask = make_grid(kind)
    conv = nn.Conv2d(3, 64, size, 2, size // 2, bias=size == 3)
    conv = conv.to("cuda", dtype).requires_grad_(False)
    norm = nn.BatchNorm2d(64).eval().to("cuda").requires_grad_(False)
    nn.init.normal_(norm.running_mean)
    layers = nn.Sequential(conv, norm, nn.ReLU(inplace=True))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        image = make_image(mask, 3, block).to("cuda", dtype, memory_format=memory_format)
        x = to_blocks(image, mask.cuda())
        found = layers(x)
        expected = copy.deepcopy(layers).double()(to_blocks(image.double(), mask.cuda()))
        bound = 2 * TOLERANCE[dtype] * max(1.0, float(expected.pixels.abs().max()))
        assert (found.stored.double() - expected.pixels).abs().max() <= bound
        pooled = F.max_pool2d(layers(to_blocks(image, mask.cuda())), 3, 2, 1)
        bound_pooled = F.max_pool2d(expected, 3, 2, 1)
        assert (pooled.stored.double() - bound_pooled.pixels).abs().max() <= bound
    assert True in taken


def test_an_image_or_blocks_that_change_before_the_first_convolution(taken):
    mask = make_grid("mixed").cuda()
    conv = nn.Conv2d(3, 64, 7, 2, 3).to("cuda", torch.float16).requires_grad_(False)

    def picture():
        return make_image(mask.cpu(), 3, 32).to("cuda", torch.float16)

    first = conv(to_blocks(picture(), mask)).combine()
    image = picture()
    x = to_blocks(image, mask)
    image.zero_()
    torch.testing.assert_close(conv(x).combine(), first, rtol=1e-2, atol=1e-2)
    y = to_blocks(image.copy_(picture()), mask)
    late = conv(y)
    image.zero_()  # has been read by now
    assert torch.equal(late.combine(), first)
    z = to_blocks(picture(), mask)
    z.mul_(2)
    assert not torch.allclose(conv(z).combine(), first, atol=1e-2)
    assert taken == [True, False, False], "the third took the short way"
