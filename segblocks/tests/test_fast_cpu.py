"""The CPU's own parts of the fast path: padded blocks by one gather, convolutions that add."""

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, buffer, distance, make_grid, make_image

from segblocks import DualResTensor, to_blocks
from segblocks.fast import onednn
from segblocks.fast.onednn import AddedConvolution
from segblocks.fast.padded import Scratch, double, join, padded, padded_image
from segblocks.fast.windows import windows
from segblocks.grid import BlockGrid
from segblocks.rules.window import Halo, padded_blocks

SHAPES = [(2, 2, 3), (1, 1, 1), (1, 4, 1)]


def blocks_of(kind: str, shape: tuple, block: int, channels: int = 5) -> DualResTensor:
    mask = make_grid(kind, shape)
    pixels, _ = buffer(mask, channels, block)
    return DualResTensor(pixels, BlockGrid.from_mask(mask), block)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [2, 8])
@pytest.mark.parametrize(
    ("before", "after", "fill"), [(1, 1, 0.0), (1, 0, -torch.inf), (1, 1, None), (3, 2, 0.5)]
)
def test_padded_blocks_are_those_of_blockpad(kind, shape, block, before, after, fill):
    x = blocks_of(kind, shape, block)
    sides = (before, after, before, after)
    expected = padded_blocks(x, Halo(sides, fill is None, 0.0 if fill is None else fill))
    scratch = Scratch()
    for _ in range(2):  # the second time from the index and in the memory of the first
        found = padded(x, before, after, fill, scratch)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.shape == theirs.shape
            assert not mine.numel() or distance(mine, theirs) < 1e-12
            assert mine.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("block", "pad"), [(8, 3), (8, 1), (4, 3), (2, 3)])
def test_a_padded_image_is_split_then_padded(kind, shape, block, pad):
    mask = make_grid(kind, shape)
    image = make_image(mask, 3, block)
    before, x = image.clone(), to_blocks(image, mask)
    expected = padded_blocks(x, Halo((pad,) * 4))
    for layout in (torch.contiguous_format, torch.channels_last):
        given = image.contiguous(memory_format=layout)
        for mine, theirs in zip(padded_image(given, x.grid, pad), expected, strict=True):
            assert mine.shape == theirs.shape
            assert not mine.numel() or distance(mine, theirs) < 1e-12
        assert torch.equal(given, before)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [2, 8])
def test_joining_and_doubling(kind, shape, block):
    x = blocks_of(kind, shape, block)
    assert distance(join(x, Scratch()), x.combine()) < 1e-12
    expected = F.interpolate(x, scale_factor=2, mode="bilinear")
    found = double(x, Scratch())
    assert found.block == expected.block == 2 * block
    assert distance(found.pixels, expected.pixels) < 1e-12


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("block", "stride"), [(2, 1), (4, 1), (4, 2), (8, 2)])
def test_windows_are_the_rows_of_a_product(kind, shape, block, stride):
    x = blocks_of(kind, shape, block)
    weight = torch.randn(3, 5, 3, 3, dtype=x.pixels.dtype)
    expected = F.conv2d(x, weight, None, stride, 1).pixels
    scratch, own = Scratch(), Scratch()
    for _ in range(2):  # the second time from the index and in the memory of the first
        rows = windows(x, stride, scratch, own)
        found = rows @ weight.permute(0, 2, 3, 1).flatten(1).t()
        assert found.shape == expected.shape
        assert distance(found, expected) < 1e-12


def test_scratch_memory_follows_size_and_type():
    scratch = Scratch()
    small, large = torch.empty(1, 4), torch.empty(1, 8, dtype=torch.float64)
    first = scratch.rows(6, small)
    assert scratch.rows(3, small).data_ptr() == first.data_ptr()
    for like, count in ((large, 3), (small, 100), (large, 2)):
        rows = scratch.rows(count, like)
        assert (rows.shape, rows.dtype) == ((count, like.shape[1]), like.dtype)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("cout", [1, 16])
def test_a_convolution_adds_to_what_is_there(
    monkeypatch, packed, dtype, kernel, stride, relu, cout
):
    if not packed:  # as in a PyTorch without oneDNN
        monkeypatch.setattr(onednn, "_has_onednn", lambda: False)
    torch.manual_seed(0)
    weight, bias = torch.randn(cout, 3, kernel, kernel, dtype=dtype), torch.randn(cout, dtype=dtype)
    convolution = AddedConvolution(weight, bias, stride, (5, 3, 13, 13))
    for n, side in (
        (5, 13),
        (2, 9),
        (1, kernel),
        (0, 9),
    ):  # other sizes than it was laid out for, too
        x = torch.randn(n, side, side, 3, dtype=dtype).permute(0, 3, 1, 2)
        after = (side - kernel) // stride + 1
        memory = torch.randn(n * after**2 + 3, cout, dtype=dtype)
        before = memory.clone()
        out = memory[1:-2].view(n, after, after, cout).permute(0, 3, 1, 2)
        expected = out.clone()
        if n:
            expected = expected + F.conv2d(x, weight, bias, stride)
        convolution(out, x, relu)
        assert torch.allclose(out, expected.relu() if relu else expected, rtol=1e-4, atol=1e-4)
        for edge in (slice(None, 1), slice(-2, None)):
            assert torch.equal(memory[edge], before[edge])


@pytest.mark.skipif(not onednn._has_onednn(), reason="this PyTorch is built without oneDNN")
@pytest.mark.parametrize("groups", [1, 32])
def test_shapes_that_come_back_get_a_layout_of_their_own(groups):
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 32 // groups, 3, 3), torch.randn(32)
    convolution = AddedConvolution(weight, bias, 1, (8, 32, 10, 10), groups)

    def call(images: int) -> None:
        x = torch.randn(images, 32, 10, 10).contiguous(memory_format=torch.channels_last)
        out = torch.zeros(images, 32, 8, 8).contiguous(memory_format=torch.channels_last)
        convolution(out, x, False)
        torch.testing.assert_close(
            out, F.conv2d(x, weight, bias, groups=groups), rtol=1e-4, atol=1e-4
        )

    for images in range(1, 9):
        call(images)
    assert not convolution._packed  # none came twice
    for images in (3, 5, 3, 5):
        call(images)
    assert [shape[0] for shape in convolution._packed] == [3, 5]
    for images in (*range(1, 20), *sorted([*range(1, 20)] * 2)):
        call(images)
    assert len(convolution._packed) == onednn._RECENT
