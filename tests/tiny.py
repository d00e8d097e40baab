"""Runs of the application small enough for tests."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train
from argparser import parse_args
from models import BACKBONES, Backbone
from utils.data import build_train_set, build_val_set, train_loader, val_loader
from utils.training.resume import folder_of
from utils.training.trainer import Trainer

SYNTHETIC = (
    "--dataset synthetic --synthetic-size 64 128 --synthetic-train-images 6 "
    "--synthetic-val-images 2 --res 128 --crop-res 64 --batch-size 2 --num-workers 0 --epochs 1 "
    "--pretrain-backbone no --backbone tiny --num-features 12 --device cpu"
).split()
REINFORCE = "--segblocks-policy reinforce --segblocks-block-size 64".split()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # to parametrise by
SPEED = ("--mode", "speed", "--speed-images", "2", "--speed-repeats", "3")


class TinyEncoder(nn.Module):
    """Features at strides 4, 8, 16 and 32, a thousandth of a ResNet."""

    channels = (8, 8, 12, 16)

    def __init__(self, momentum: float, eps: float):
        super().__init__()
        stages, inputs = [], 3
        for outputs, stride in zip(self.channels, (4, 2, 2, 2)):
            conv = nn.Conv2d(inputs, outputs, stride + 1, stride, stride // 2, bias=False)
            stages.append(nn.Sequential(conv, nn.BatchNorm2d(outputs, eps, momentum), nn.ReLU()))
            inputs = outputs
        self.stages = nn.ModuleList(stages)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


TINY = Backbone(TinyEncoder, num_features=12, bn_momentum=0.05, bn_eps=1e-5)


@pytest.fixture(scope="module")
def tiny_backbone():
    """--backbone tiny, for runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "tiny", TINY)
        yield


def arguments(exp_dir: Path, *flags: str) -> list[str]:
    """A command line on a few synthetic scenes; later flags win."""
    return [*SYNTHETIC, "--exp-dir", str(exp_dir), *flags]


def run(exp_dir: Path, *flags: str) -> Path:
    """Run train.py in this process; -> the experiment's folder."""
    argv = arguments(exp_dir, *flags)
    assert train.main(argv) == 0
    return folder_of(parse_args(argv))


def make_trainer(tmp_path, *flags):
    args = parse_args(arguments(tmp_path, *flags))
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    sets = build_train_set(args, device), build_val_set(args)
    model = train.build(args, sets[0]).to(device)
    loaders = train_loader(sets[0], args), val_loader(sets[1], args)
    return Trainer(model, *loaders, args, device)


def same(a, b):
    """Equal to the last bit, in any nesting of containers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- the loop ----


def checkpoint(folder: Path, name: str = "checkpoint.pth") -> dict:
    return torch.load(folder / name, weights_only=True)


def figures(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def make_camvid(root: Path, train: int = 2, val: int = 1) -> Path:
    """CamVid's folders with made-up frames of 128×96."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            image, label = scene(i, height=96, width=128, classes=11)
            save(root / split / f"frame{i}.png", image)
            save(root / f"{split}annot" / f"frame{i}.png", label)
    return root


def make_cityscapes(root: Path, train: int = 2, val: int = 1) -> Path:
    """The official folders with made-up frames of 512×256 and official label ids."""
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            image, label = scene(i, height=256, width=512, classes=34)
            stem = f"town_{i:06d}_000019"
            save(root / "leftImg8bit" / split / "town" / f"{stem}_leftImg8bit.png", image)
            save(root / "gtFine" / split / "town" / f"{stem}_gtFine_labelIds.png", label)
    return root


def scene(seed: int, height: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Stripes of every class, and an image that shows them."""
    rng = np.random.default_rng(seed)
    label = np.broadcast_to(np.arange(width) * classes // width, (height, width)).astype(np.uint8)
    noise = rng.integers(0, 60, (height, width, 3))
    return (label[..., None] * 5 + noise).astype(np.uint8), label


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
