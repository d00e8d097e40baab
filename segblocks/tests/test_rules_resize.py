"""Resizing equals the definition, neighbours across block borders included."""

import pytest
import torch.nn.functional as F
from agreement import GRIDS, assert_rule, make_grid, make_image
from torch import nn

from segblocks import to_blocks


def resize(**settings):
    return lambda x: F.interpolate(x, **settings)


# Images are 16×24 here, in blocks of 8.
RESIZE = {
    "nearest 2": resize(scale_factor=2),
    "nearest 3": resize(scale_factor=3, mode="nearest"),
    "nearest size": resize(size=(32, 48)),
    "nearest 0.5": resize(scale_factor=0.5),
    "nearest 1.5": resize(scale_factor=1.5, mode="nearest"),
    "nearest 0.75": resize(scale_factor=0.75, mode="nearest"),
    "nearest-exact 0.5": resize(scale_factor=0.5, mode="nearest-exact"),
    "bilinear 2": resize(scale_factor=2, mode="bilinear"),
    "bilinear 2.0 pair": resize(scale_factor=(2.0, 2.0), mode="bilinear", align_corners=False),
    "bilinear 3": resize(scale_factor=3, mode="bilinear"),
    "bilinear 4": resize(scale_factor=4, mode="bilinear"),
    "bilinear 8": resize(scale_factor=8, mode="bilinear"),
    "bilinear size": resize(size=(64, 96), mode="bilinear"),
    "bilinear size list": resize(size=[32, 48], mode="bilinear"),
    "bilinear 0.5": resize(scale_factor=0.5, mode="bilinear"),
    "bilinear 0.25": resize(scale_factor=0.25, mode="bilinear"),
    "bilinear size down": resize(size=(8, 12), mode="bilinear"),
    "bilinear 1.5": resize(scale_factor=1.5, mode="bilinear"),
    "bilinear 0.75": resize(scale_factor=0.75, mode="bilinear"),
    "bilinear 1.25": resize(scale_factor=1.25, mode="bilinear"),
    "bilinear 2.25": resize(scale_factor=2.25, mode="bilinear"),
    "bilinear same size": resize(size=(16, 24), mode="bilinear"),
    "recompute": resize(scale_factor=2, mode="bilinear", recompute_scale_factor=True),
    "nn.Upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
    "nn.UpsamplingNearest2d": nn.UpsamplingNearest2d(scale_factor=2),
    "shuffle": lambda x: F.pixel_shuffle(x, 2),
    "nn.PixelShuffle": nn.PixelShuffle(2),
    "unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "shuffle there and back": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
}  # fmt: skip


@pytest.mark.parametrize("function", RESIZE.values(), ids=RESIZE)
def test_resize(function):
    assert_rule(function)


@pytest.mark.parametrize("kind", GRIDS)
def test_resize_on_every_kind_of_grid(kind):
    assert_rule(RESIZE["bilinear 2"], kind)
    assert_rule(RESIZE["bilinear 1.5"], kind)


@pytest.mark.parametrize("factor", [0.3333, 1.3333, 0.50001, 2.0001])
def test_a_factor_that_is_nearly_whole_is_not_rounded(factor):
    grid = make_grid("mixed")
    blocks = to_blocks(make_image(grid, 4), grid)
    with pytest.raises(NotImplementedError, match="no_blocks"):
        F.interpolate(blocks, scale_factor=factor)


def test_nearest_by_thirds():
    assert_rule(resize(size=(4 * 2, 4 * 3), mode="nearest"), block=12)
    assert_rule(resize(scale_factor=1 / 3, mode="bilinear"), block=12)
