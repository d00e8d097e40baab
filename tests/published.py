"""Checkpoints as the published release wrote them, made up from the published names and shapes."""

import json
import math
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

KEY_FILES = Path(__file__).parent / "data" / "published_checkpoint_keys"
BACKBONES = ("resnet18", "resnet50", "efficientnet_lite1")


@pytest.fixture
def easydict(monkeypatch):
    """A class that pickles as easydict.EasyDict does: entries as items and as attributes."""

    class EasyDict(dict):
        def __init__(self, **entries):
            super().__init__(**entries)
            self.__dict__.update(entries)

    EasyDict.__module__, EasyDict.__qualname__ = "easydict", "EasyDict"
    module = types.ModuleType("easydict")
    module.EasyDict = EasyDict
    monkeypatch.setitem(sys.modules, "easydict", module)
    return EasyDict


def shapes_of(backbone: str) -> dict[str, list[int]]:
    return json.loads((KEY_FILES / f"{backbone}.json").read_text())


def published_state(backbone: str, easydict: type) -> dict:
    """Weights that keep activations near one, and what else the release saved."""
    generator = torch.Generator().manual_seed(0)
    return {
        "state_dict": OrderedDict(
            (name, _value(name, shape, generator)) for name, shape in shapes_of(backbone).items()
        ),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "scheduler": {"last_epoch": 350, "_last_lr": [1e-6]},
        "progress": easydict(epoch=350, score=np.float64(0.762), count=np.int64(-5), flops=None),
        "logger_step": 12345,
        "config": easydict(lr=4e-4, nested=easydict(name="x"), sizes=[easydict(a=1)]),
    }


def _value(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if len(shape) > 1:
        fan_in = math.prod(shape[1:])
        return torch.randn(shape, generator=generator) * math.sqrt(2 / fan_in)
    if name.endswith(("running_var", "weight")):
        return 0.5 + torch.rand(shape, generator=generator)
    return 0.1 * torch.randn(shape, generator=generator)
