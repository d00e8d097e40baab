"""Synthetic scenes: deterministic, the same at any size, with small things in a few places."""

import numpy as np
import pytest
import torch

from dataloaders import build_dataset


def _label(size: tuple[int, int], index: int, split: str = "train", **options) -> np.ndarray:
    data = build_dataset("synthetic", split, height=size[0], width=size[1], **options)
    return data[index][1].numpy()


def test_same_index_gives_same_bits_whatever_came_before():
    first = build_dataset("synthetic", "train", height=96, width=160)
    again = build_dataset("synthetic", "train", height=96, width=160, seed=7)
    torch.manual_seed(5)
    np.random.seed(5)
    _ = again[3], again[1]
    for one, other in zip(first[2], again[2]):
        assert torch.equal(one, other)


def test_global_generators_are_left_alone():
    data = build_dataset("synthetic", "train", height=64, width=64)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    _ = data[0]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("other", [{"index": 1}, {"split": "val"}, {"scene_seed": 1}])
def test_index_split_and_scene_seed_each_change_the_scene(other):
    base = {"size": (96, 192), "index": 0}
    assert (_label(**base) != _label(**{**base, **other})).mean() > 0.05


@pytest.mark.parametrize("size", [(32, 32), (96, 97), (100, 300), (360, 480)])
def test_any_size_and_valid_ids(size):
    data = build_dataset("synthetic", "val", height=size[0], width=size[1])
    image, label = data[0]
    assert image.shape == (3, *size)
    assert image.dtype == torch.uint8
    assert label.shape == size
    assert label.dtype == torch.uint8
    assert set(label.unique().tolist()) <= {*range(19), 255}
    assert image.float().std() > 15  # a picture, not a plain canvas


@pytest.mark.parametrize("index", range(3))
def test_layout_does_not_depend_on_resolution(index):
    coarse, fine = _label((256, 512), index), _label((512, 1024), index)
    assert (coarse == fine[::2, ::2]).mean() > 0.95


def test_every_class_occurs_and_large_ones_are_everywhere():
    labels = [_label((256, 512), i) for i in range(40)]
    pixels = sum(np.bincount(label.ravel(), minlength=256) for label in labels)
    assert (pixels[:19] > 0).all()
    assert pixels[255] > 0
    assert all(np.isin((0, 2, 10), label).all() for label in labels)  # road, building, sky


def test_small_classes_fill_a_quarter_to_half_of_the_blocks():
    data = build_dataset("synthetic", "train")
    shares = []
    for i in range(30):
        small = np.isin(data[i][1].numpy(), data.info.small_ids)
        shares.append(small.reshape(8, 64, 16, 64).any((1, 3)).mean())
    assert 0.25 <= np.mean(shares) <= 0.45
    assert max(shares) - min(shares) > 0.1  # it varies, so a fixed pattern cannot fit
    assert max(shares) < 0.7


def test_small_things_are_where_resolution_matters():
    """At half resolution far more label pixels are lost in small classes than in large ones."""
    lost, total = np.zeros(256), np.zeros(256)
    data = build_dataset("synthetic", "train")
    for i in range(5):
        label = data[i][1].numpy()
        halved = label[::2, ::2].repeat(2, 0).repeat(2, 1)
        lost += np.bincount(label[label != halved], minlength=256)
        total += np.bincount(label.ravel(), minlength=256)
    small = np.zeros(256, bool)
    small[list(data.info.small_ids)] = True
    assert lost[small].sum() / total[small].sum() > 5 * lost[~small].sum() / total[~small].sum()


def test_names_length_and_info():
    data = build_dataset("synthetic", "train", length=5, height=64, width=128)
    assert len(data) == 5
    assert data.name_of(3) == "synthetic/train/000003"
    assert data.info.name == "synthetic"
    assert data.info.num_classes == 19
    assert len(list(data)) == 5  # iteration ends


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 8}, "too small"),
        ({"length": 0}, "is empty"),
        ({"scene_seed": -1}, "scene seed is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"data_dir": "/somewhere"}, "not read from a folder"),
        ({"split": "test"}, "no split 'test'; choose from train, val"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build_dataset("synthetic", **{"split": "train", **options})
    assert "\n" not in str(error.value)
