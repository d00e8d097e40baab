"""Grids, the views of a block tensor, and `no_blocks`."""

import torch
import torch.nn.functional as F
from agreement import TOLERANCE, distance, make_grid, make_image
from networks import image, net
from torch import nn

from segblocks import (
    BlockGrid,
    DualResTensor,
    execute_with_grid,
    no_blocks,
    to_blocks,
)

# -- grids ---------------------------------------------------------------------------------------


def test_bookkeeping_can_be_built_once():
    mask = make_grid("mixed")
    grid = BlockGrid.from_mask(mask)
    assert grid.n_high == int(mask.sum())
    assert grid.n_high + grid.n_low == mask.numel()
    same = BlockGrid.from_mask(mask, n_high=grid.n_high)
    x = make_image(mask, 3)
    for g in (mask, grid, same):
        assert torch.equal(execute_with_grid(net(1), x, g), execute_with_grid(net(1), x, mask))


def test_views_of_the_two_resolutions():
    mask = make_grid("mixed")
    blocks = to_blocks(make_image(mask, 3), mask)
    n_high = int(mask.sum())
    assert blocks.highres.shape == (n_high, 3, 8, 8)
    assert blocks.lowres.shape == (mask.numel() - n_high, 3, 4, 4)
    assert blocks.highres.data_ptr() == blocks.pixels.data_ptr()
    assert blocks.highres.is_contiguous(memory_format=torch.channels_last)
    assert blocks.shape == (2, 3, 16, 24)
    assert blocks.size(1) == 3
    assert blocks.dim() == blocks.ndim == 4
    assert blocks.dtype == torch.float64
    assert "high=6/12" in repr(blocks)


def test_images_of_every_layout_split_the_same():
    mask = make_grid("mixed")
    x = make_image(mask, 3)
    pixels = to_blocks(x, mask).pixels
    assert torch.equal(
        to_blocks(x.contiguous(memory_format=torch.channels_last), mask).pixels, pixels
    )
    assert torch.equal(
        to_blocks(x.transpose(2, 3).contiguous().transpose(2, 3), mask).pixels, pixels
    )
    assert torch.equal(
        to_blocks(x, mask.transpose(1, 2).contiguous().transpose(1, 2)).pixels, pixels
    )


# -- no_blocks -----------------------------------------------------------------------------------


def test_no_blocks_on_dense_tensors_is_the_function_itself():
    calls = []

    @no_blocks
    def f(x, *, scale=1):
        """Doc."""
        calls.append(x)
        return x * scale

    x = image()
    assert torch.equal(f(x, scale=2), 2 * x)
    assert calls[0] is x
    assert f.__name__ == "f"
    assert f.__doc__ == "Doc."


def test_no_blocks_is_combine_function_split():
    mask = make_grid("mixed")
    blocks = to_blocks(make_image(mask, 3), mask)
    seen = []

    def f(x, y, *, z):
        seen.extend((x, y, z["inner"]))
        return x + x.mean((2, 3), keepdim=True) * y

    out = no_blocks(f)(blocks, 2.0, z={"inner": blocks})
    dense = blocks.combine()
    assert torch.equal(seen[0], dense)
    assert seen[1] == 2.0
    assert torch.equal(seen[2], dense)
    expected = to_blocks(dense + dense.mean((2, 3), keepdim=True) * 2, blocks.grid)
    assert out.grid is blocks.grid
    assert torch.equal(out.pixels, expected.pixels)


def test_no_blocks_splits_pictures_of_any_scale_and_leaves_vectors():
    mask = make_grid("mixed")
    blocks = to_blocks(make_image(mask, 3), mask)

    def f(x):
        return {
            "half": F.avg_pool2d(x, 2),
            "vector": x.mean((2, 3)),
            "pool": [x.amax((2, 3), True)],
        }

    out = no_blocks(f)(blocks)
    assert isinstance(out["half"], DualResTensor)
    assert out["half"].block == 4
    assert out["vector"].shape == (2, 3)
    assert out["pool"][0].shape == (2, 3, 1, 1)


def test_no_blocks_wraps_modules_and_methods():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1)).double()
    mask = make_grid("all")
    x = make_image(mask, 3)
    squeeze = no_blocks(pool)
    out = execute_with_grid(lambda x: x * squeeze(x).sigmoid(), x, mask)
    assert distance(out, x * pool(x).sigmoid()) < TOLERANCE
    assert distance(execute_with_grid(no_blocks(pool.forward), x, mask), pool(x)) < TOLERANCE


def test_legacy_passes_through_no_blocks():
    mask = make_grid("mixed")
    body = net(2)

    def run(x):
        return F.interpolate(no_blocks(torch.relu)(body(x)), scale_factor=2, mode="bilinear")

    x = make_image(mask, 3)
    modern, legacy = (execute_with_grid(run, x, mask, flag) for flag in (False, True))
    assert distance(modern, legacy) > 1e-3
