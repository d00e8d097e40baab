"""Data sets made of files, the registry, and loaders that repeat."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders import (
    DATASETS,
    DataError,
    DatasetInfo,
    build_dataset,
    build_loader,
    file_datasets,
    val_transform,
)
from dataloaders.decode import read_image
from dataloaders.info import CAMVID, CITYSCAPES

CITY, FRAME = "aachen", "aachen_000000_000019"


@pytest.fixture(autouse=True)
def _no_folders_from_outside(monkeypatch):
    for kind in file_datasets().values():
        monkeypatch.delenv(kind.variable, raising=False)


def _save(array: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def _noise(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def _paths(name: str, root: Path, frame: int = 0) -> tuple[Path, Path]:
    if name == "camvid":
        return root / f"train/f{frame}.png", root / f"trainannot/f{frame}.png"
    stem = f"{CITY}_{frame:06d}_000019"
    return (
        root / f"leftImg8bit/train/{CITY}/{stem}_leftImg8bit.png",
        root / f"gtFine/train/{CITY}/{stem}_gtFine_labelIds.png",
    )


def _make(name: str, root: Path, frames: int = 3, size: tuple[int, int] = (24, 40)) -> Path:
    for i in range(frames):
        image, label = _paths(name, root, i)
        _save(_noise(*size, seed=i), image)
        _save(np.random.default_rng(i).integers(0, 12, size, dtype=np.uint8), label)
    return root


def _one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- class tables ---------------------------------------------------------------------------


@pytest.mark.parametrize(("info", "count"), [(CITYSCAPES, 19), (CAMVID, 11)])
def test_class_tables(info, count):
    assert info.num_classes == len(info.colours) == count
    assert len(set(info.classes)) == len(set(info.colours)) == count
    assert info.ignore_index == 255
    assert [info.classes[i] for i in info.small_ids] == list(info.small_classes)
    assert info.small_ids


def test_info_refuses_inconsistent_tables():
    with pytest.raises(ValueError, match="2 classes but 1 colours"):
        DatasetInfo("x", ("a", "b"), ((0, 0, 0),))
    with pytest.raises(ValueError, match="small classes \\['c'\\]"):
        DatasetInfo("x", ("a",), ((0, 0, 0),), small_classes=("c",))


# --- reading --------------------------------------------------------------------------------


def test_cityscapes_ids_become_train_ids(tmp_path):
    root = _make("cityscapes", tmp_path, frames=1, size=(5, 7))
    ids = np.array([*range(34), 255], dtype=np.uint8).reshape(5, 7)
    image, label = _paths("cityscapes", root)
    _save(ids, label)
    data = build_dataset("cityscapes", "train", root)
    pixels, mapped = data[0]
    # labels.py of cityscapesScripts, ids 0..33 and -1
    expected = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12]
    expected += [13, 14, 15, 255, 255, 16, 17, 18, 255]
    assert mapped.flatten().tolist() == expected
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), _noise(5, 7))
    assert data.name_of(0) == str(image)


def test_camvid_keeps_ids_and_void_is_ignored(tmp_path):
    root = _make("camvid", tmp_path, frames=1, size=(3, 4))
    _save(np.arange(12, dtype=np.uint8).reshape(3, 4), _paths("camvid", root)[1])
    data = build_dataset("camvid", "train", root)
    assert data[0][1].flatten().tolist() == [*range(11), 255]
    assert data.info.name == "camvid"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_image_format_is_read_as_rgb(tmp_path, mode):
    root = _make("camvid", tmp_path, frames=1)
    Image.fromarray(_noise(24, 40)).convert(mode).save(_paths("camvid", root)[0])
    assert build_dataset("camvid", "train", root)[0][0].shape == (3, 24, 40)


def test_palette_labels_are_read_as_ids(tmp_path):
    root = _make("camvid", tmp_path, frames=1)
    path = _paths("camvid", root)[1]
    ids = np.array(Image.open(path))
    picture = Image.fromarray(ids).convert("P")
    picture = Image.frombytes("P", picture.size, ids.tobytes())
    picture.putpalette([200] * 768)
    picture.save(path)
    read = build_dataset("camvid", "train", root)[0][1].numpy()
    assert np.array_equal(read, np.where(ids == 11, 255, ids))


def test_camvid_accepts_jpg_and_a_test_split(tmp_path):
    _save(_noise(24, 40), tmp_path / "test/a.jpg")
    _save(_noise(24, 40), tmp_path / "test/b.PNG")
    for name in "ab":
        _save(np.zeros((24, 40), np.uint8), tmp_path / f"testannot/{name}.png")
    assert len(build_dataset("camvid", "test", tmp_path)) == 2


def test_folder_from_environment_and_argument_first(tmp_path, monkeypatch):
    _make("camvid", tmp_path / "one", frames=1)
    _make("camvid", tmp_path / "two", frames=2)
    monkeypatch.setenv("SEGBLOCKS_CAMVID_DIR", str(tmp_path / "one"))
    assert len(build_dataset("camvid", "train")) == 1
    assert len(build_dataset("camvid", "train", tmp_path / "two")) == 2


# --- bad input ------------------------------------------------------------------------------


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match="cityscape'; choose from cityscapes, camvid, "):
        build_dataset("cityscape", "train")
    names = {"cityscapes", "camvid", "camvid_full", "mapillary", "custom", "synthetic"}
    assert set(DATASETS) == names


@pytest.mark.parametrize("name", ["cityscapes", "camvid"])
def test_no_folder_given_names_flag_and_variable(name):
    with pytest.raises(FileNotFoundError) as error:
        build_dataset(name, "train")
    message = _one_line(error)
    assert f"--{name}-data-dir" in message
    assert f"SEGBLOCKS_{name.upper()}_DIR" in message
    assert {"cityscapes": "gtFine/", "camvid": "annot/"}[name] in message


@pytest.mark.parametrize("name", ["cityscapes", "camvid"])
def test_missing_folder_is_named(name, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):  # absent, and without the layout in it
        with pytest.raises(FileNotFoundError, match=str(folder)) as error:
            build_dataset(name, "train", folder)
        assert f"--{name}-data-dir" in _one_line(error)


@pytest.mark.parametrize("name", ["cityscapes", "camvid"])
def test_zero_images(name, tmp_path):
    image, _ = _paths(name, _make(name, tmp_path, frames=1))
    image.unlink()
    with pytest.raises(FileNotFoundError, match="holds no images") as error:
        build_dataset(name, "train", tmp_path)
    _one_line(error)


@pytest.mark.parametrize("name", ["cityscapes", "camvid"])
def test_image_without_label(name, tmp_path):
    image, label = _paths(name, _make(name, tmp_path), 1)
    label.unlink()
    with pytest.raises(FileNotFoundError, match=f"{image} has no label: expected {label}") as error:
        build_dataset(name, "train", tmp_path)
    assert "1 of 3" in _one_line(error)


def test_unknown_split(tmp_path):
    root = _make("cityscapes", tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; choose from train, val"):
        build_dataset("cityscapes", "test", root)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    ("what", "suffix"), [("image", ".png"), ("image", ".jpg"), ("label", ".png")]
)
def test_truncated_file_is_named(tmp_path, what, suffix, fraction):
    root = _make("camvid", tmp_path, frames=2, size=(60, 80))
    image, label = _paths("camvid", root)
    if what == "image":
        image.unlink()
        image = _save(_noise(60, 80), image.with_suffix(suffix))
    path = image if what == "image" else label
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    data = build_dataset("camvid", "train", root)
    index = next(i for i in range(2) if data.name_of(i) == str(image))
    with pytest.raises(DataError, match=f"{path}: cannot read this {what}") as error:
        data[index]
    _one_line(error)
    assert len(data[1 - index]) == 2


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_file_that_is_no_image_is_named(tmp_path, content):
    image, _ = _paths("cityscapes", _make("cityscapes", tmp_path, frames=1))
    image.write_bytes(content)
    with pytest.raises(ValueError, match=f"{image}: cannot read this image") as error:
        build_dataset("cityscapes", "train", tmp_path)[0]
    _one_line(error)


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_more_than_eight_bits_are_not_cut_off(tmp_path, mode):
    image, _ = _paths("camvid", _make("camvid", tmp_path, frames=1))
    image.unlink()
    deep = image.with_suffix(".png" if mode == "I;16" else ".tiff")
    values = np.full((60, 80), 3000, np.uint16 if mode == "I;16" else np.float32)
    Image.fromarray(values).save(deep)
    with pytest.raises(DataError, match=f"{deep}: image has pixel format {mode}.*8-bit"):
        read_image(deep)


def test_damaged_bytes_are_an_error(tmp_path):
    image, _ = _paths("camvid", _make("camvid", tmp_path, frames=1))
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 0xFF
    image.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=f"{image}: cannot read this image"):
        build_dataset("camvid", "train", tmp_path)[0]


@pytest.mark.parametrize(("name", "bad"), [("cityscapes", [34, 254]), ("camvid", [12, 255])])
def test_label_ids_outside_the_table(name, bad, tmp_path):
    _, label = _paths(name, _make(name, tmp_path))
    ids = np.zeros((24, 40), np.uint8)
    ids[3, 4], ids[5, 6] = bad
    _save(ids, label)
    with pytest.raises(ValueError, match=f"{label}: label ids ") as error:
        build_dataset(name, "train", tmp_path)[0]
    assert str(bad) in _one_line(error)


def test_colour_label_is_refused(tmp_path):
    _, label = _paths("cityscapes", _make("cityscapes", tmp_path, frames=1))
    _save(_noise(24, 40), label)
    with pytest.raises(ValueError, match=f"{label}: label has pixel format RGB") as error:
        build_dataset("cityscapes", "train", tmp_path)[0]
    _one_line(error)


def test_label_of_another_size(tmp_path):
    image, label = _paths("camvid", _make("camvid", tmp_path, frames=1))
    _save(np.zeros((24, 39), np.uint8), label)
    with pytest.raises(ValueError, match=f"{label}: label is 39x24 .*{image} is 40x24") as error:
        build_dataset("camvid", "train", tmp_path)[0]
    _one_line(error)


def test_frame_twice(tmp_path):
    image, _ = _paths("camvid", _make("camvid", tmp_path, frames=1))
    _save(_noise(24, 40), image.with_suffix(".jpg"))
    with pytest.raises(ValueError, match="same frame; remove one"):
        build_dataset("camvid", "train", tmp_path)


def test_error_in_a_worker_is_the_same_line(tmp_path):
    image, _ = _paths("camvid", _make("camvid", tmp_path))
    image.write_bytes(b"")
    data = build_dataset("camvid", "train", tmp_path, val_transform())
    messages = []
    for workers in (0, 1):
        try:  # not pytest.raises: its record would keep the loader's processes waiting
            list(build_loader(data, 1, train=False, num_workers=workers))
        except DataError as error:
            messages.append(str(error))
    assert len(messages) == 2
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert messages[0].startswith(f"{image}: cannot read")


def test_data_error_survives_pickling():
    error = pickle.load(io.BytesIO(pickle.dumps(DataError("a/b.png: bad"))))
    assert str(error) == "a/b.png: bad"


def test_images_of_two_sizes_in_a_batch(tmp_path):
    root = _make("camvid", tmp_path, frames=1)
    _save(_noise(30, 40), root / "train/g.png")
    _save(np.zeros((30, 40), np.uint8), root / "trainannot/g.png")
    data = build_dataset("camvid", "train", root, val_transform())
    with pytest.raises(ValueError, match="use batch size 1"):
        list(build_loader(data, 2, train=True))
    (batch,) = build_loader(data, 2, train=False)  # validation has no need of one size
    images, labels, indices = batch
    assert [tuple(image.shape[1:]) for image in images] == [tuple(x.shape) for x in labels]
    assert tuple(labels[1].shape) == (30, 40) != tuple(labels[0].shape)
    assert indices.tolist() == [0, 1]
