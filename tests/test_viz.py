"""Pictures show what they are said to show."""

import numpy as np
import torch
from PIL import Image

from dataloaders import DatasetInfo
from utils.validation import viz

INFO = DatasetInfo("two", ("a", "b"), ((10, 20, 30), (40, 50, 60)))


def test_labels_in_colour_and_void_in_black():
    picture = viz.colour_labels(torch.tensor([[0, 1, 255]]), INFO.colours)
    assert picture.dtype == torch.uint8
    assert picture.permute(1, 2, 0).tolist() == [[[10, 20, 30], [40, 50, 60], [0, 0, 0]]]


def test_overlay_keeps_high_blocks_bright_and_outlined_and_darkens_low_ones():
    white = torch.full((3, 60, 120), 255, dtype=torch.uint8)  # 60: the last row of blocks is cut
    picture = viz.overlay_grid(white, torch.tensor([[True, False]]), block_size=64)
    assert picture.shape == white.shape
    assert picture[:, 30, 30].tolist() == [255, 255, 255]
    assert picture[:, 0, 30].tolist() == list(viz.HIGH_EDGE)
    assert (picture[:, :, 64:] < 128).all()
    assert (white == 255).all()  # not drawn upon


def test_four_pictures_side_by_side_are_of_moderate_size():
    pictures = [torch.full((3, 600, 1200), i, dtype=torch.uint8) for i in range(4)]
    joined = viz.side_by_side(pictures)
    assert joined.shape == (3, 400, 800)
    assert [joined[0, y, x].item() for y in (0, 399) for x in (0, 799)] == [0, 1, 2, 3]


def test_saved_picture_comes_back(tmp_path):
    picture = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    viz.save_picture(tmp_path / "a" / "b.png", picture)
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "a" / "b.png")))
    assert torch.equal(pixels.permute(2, 0, 1), picture)
