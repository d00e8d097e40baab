"""Packed weights, neighbour tables and padded blocks: what the fused kernels are given."""

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, distance, make_grid, make_image
from fast_networks import SmallSwiftNet
from neighbours import (
    extended,
    neighbour_table,
    own_rows,
    padded_blocks,
    stem_places,
)
from programs import record

from segblocks import to_blocks
from segblocks.fast.fuse import fuse
from segblocks.fast.patches import identity
from segblocks.fast.row_conv import pack_weights
from segblocks.fast.run import Network
from segblocks.fast.stem import padded_lines, stem_matrix
from segblocks.fast.steps import ConvStep
from segblocks.fast.tables import Scale

SIZES = [(64, 64, 3), (128, 72, 1), (192, 128, 3), (64, 136, 1)]


def plain_matrix(weight):
    """(taps·CIN, COUT), taps outermost, as `pack_weights` takes it."""
    cin, k = weight.shape[1:3]
    rows = [weight[:, c, y, x] for y in range(k) for x in range(k) for c in range(cin)]
    return torch.stack(rows)


def unpack(packed, cin, cout, taps):
    """(COUT, CIN, k, k) from packed tiles, element by element."""
    k = round(taps**0.5)
    weight = torch.empty(cout, cin, k, k, dtype=packed.dtype)
    channel = torch.arange(cin)
    for tap in range(taps):
        step = channel // 64 * taps + tap
        for out in range(cout):
            place = (channel % 64 // 8 ^ out % 8) * 8 + channel % 8
            weight[out, :, tap // k, tap % k] = packed[step, out, place]
    return weight


def unpack_turned(packed, cin, cout, taps):
    """As `unpack`, of weights whose product is turned round: taps column by column, and of each 16
    rows of the matrix unit row r has channel 4·(r/2) + r%2, row r + 8 the channel two further."""
    rows = unpack(packed, cin, -(-cout // 16) * 16, taps)
    weight = torch.empty_like(rows)
    for row in range(rows.shape[0]):
        r = row % 8
        weight[row - row % 16 + 4 * (r // 2) + r % 2 + row % 16 // 8 * 2] = rows[row]
    return weight[:cout].transpose(2, 3)


@pytest.mark.parametrize(("cin", "cout", "k"), SIZES)
def test_packed_weights(cin, cout, k):
    weight = torch.randn(cout, cin, k, k)
    packed = pack_weights(plain_matrix(weight), k * k)
    assert packed.shape == (cin // 64 * k * k, -(-cout // 128) * 128, 64)
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, cin, cout, k * k), weight)
    assert not packed[:, cout:].any(), "channels beyond the last are zero"


def test_what_a_network_packs():
    """Parameters of each step, read back from the kernel's layout."""
    net = SmallSwiftNet().eval()
    mask = make_grid("one")
    program = record(net, make_image(mask, 3, 32), mask)
    network = Network(program, fuse(program), torch.float64)
    steps = [s for s in network.steps if isinstance(s, ConvStep)]
    assert any(s.extra is not None for s in steps)
    assert any(s.weight.shape[0] == 19 for s in steps)
    assert {network.packed[id(s)].by_patches for s in steps} == {True, False}
    for step in steps:
        packed, (cout, cin, k, _) = network.packed[id(step)], step.weight.shape
        width = -(-cout // 8) * 8
        extra = 0 if step.extra is None else step.extra_weight.shape[1]
        passed_on = packed.by_patches and step.residual is not None
        read = unpack_turned if packed.by_patches else unpack
        assert packed.channels == (cin, 64 if passed_on else extra, width)
        split = cin // 64 * k * k
        assert torch.equal(read(packed.weights[:split], cin, cout, k * k), step.weight)
        if extra:
            second = read(packed.weights[split:], extra, cout, 1)
            assert torch.equal(second, step.extra_weight)
        elif passed_on:
            second = read(packed.weights[split:], 64, cout, 1)
            assert torch.equal(second[:, :, 0, 0].t(), identity(cout).double())
        else:
            assert packed.weights.shape[0] == split
        assert torch.equal(packed.bias[:cout], step.bias.float())
        assert packed.bias.numel() == packed.weights.shape[1]
        assert not packed.bias[cout:].any()
        for own, affine in ((packed.pre, step.pre), (packed.post, step.post)):
            assert (own is None) == (affine is None)
            if affine is not None:
                channels = affine.scale.numel()
                assert torch.equal(own[0, :channels], affine.scale.to(own.dtype))
                assert torch.equal(own[1, :channels], affine.shift.to(own.dtype))


@pytest.mark.parametrize("k", [3, 7])
def test_the_stem_as_a_matrix_product(k):
    """Windows of eight rows of eight pixels of four channels, times the matrix."""
    weight = torch.randn(16, 3, k, k, dtype=torch.float64)
    image = torch.randn(2, 3, 12, 18, dtype=torch.float64)
    matrix = stem_matrix(weight)
    assert matrix.shape == (256, 16)
    whole = F.pad(image, (3, 5, 3, 5, 0, 1))  # N,4,H+8,W+8
    windows = whole.unfold(2, 8, 2).unfold(3, 8, 2)[:, :, :6, :9]  # N,4,6,9,8,8
    rows = windows.permute(0, 2, 3, 4, 5, 1).reshape(2, 6, 9, 256)
    expected = F.conv2d(image, weight, stride=2, padding=k // 2)
    assert distance((rows @ matrix).permute(0, 3, 1, 2), expected) < 1e-10


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_neighbour_tables_say_what_a_convolution_reads(kind, stride):
    """The plain table, which the kernel's is compared with, is right: it reproduces F.conv2d."""
    mask, block = make_grid(kind), 8
    x = to_blocks(make_image(mask, 4, block), mask)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    rows = extended(x)
    taps = neighbour_table(mask, block, stride)
    scale = Scale.of(block, x.grid.n_high, mask.numel())
    assert rows.shape[0] == scale.zero + 1
    assert taps.max() == scale.zero, "some window reaches beyond the image"
    product = sum(rows[taps[i]] @ weight[:, :, i // 3, i % 3].t() for i in range(9))
    expected = F.conv2d(x, weight, stride=stride, padding=1)
    own = own_rows(mask, block // stride)
    assert sorted(own.tolist()) == list(range(expected.pixels.shape[0]))
    assert distance(product, expected.pixels[own]) < 1e-10


@pytest.mark.parametrize("kind", GRIDS)
def test_padded_blocks_hold_every_window_of_the_stem(kind):
    mask, block = make_grid(kind), 8
    image = make_image(mask, 3, block)
    weight = torch.randn(8, 3, 7, 7, dtype=torch.float64)
    flat = padded_blocks(image, mask).flatten()
    high_line, low_line = padded_lines(block)
    places = stem_places(mask, block)
    high_rows = int(mask.sum()) * (block // 2) ** 2
    out = []
    for m, place in enumerate(places.tolist()):
        line = high_line if m < high_rows else low_line
        start = place * 8
        window = [flat[start + y * line : start + y * line + 28] for y in range(7)]
        out.append(torch.stack(window).view(7, 7, 4)[..., :3])
    product = torch.einsum("myxc,ocyx->mo", torch.stack(out), weight)
    expected = F.conv2d(to_blocks(image, mask), weight, stride=2, padding=3)
    assert distance(product, expected.pixels[own_rows(mask, block // 2)]) < 1e-10
