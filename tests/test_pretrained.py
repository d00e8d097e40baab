"""ImageNet weights for the encoders: the right ones are loaded, missing ones are a clear error."""

import sys
import urllib.error

import pytest
import torch
from torch import nn

from models import BACKBONES, build_model, pretrained
from models.pretrained import CLASSIFIER_PREFIXES, rename_timm


class FakeWeights:
    """Stands for a torchvision weights entry."""

    url = "https://example.org/resnet18-0123.pth"

    def __init__(self, result):
        self.result = result

    def get_state_dict(self, **options):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_resnets_take_torchvisions_weights(monkeypatch):
    state = build_model("resnet18", 2).backbone.state_dict()
    whole = {**state, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    monkeypatch.setitem(pretrained.RESNET_WEIGHTS, "resnet18", FakeWeights(whole))
    net = build_model("resnet18", 2, pretrained=True)
    for name, value in net.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("bad hash")])
def test_weights_that_cannot_be_had_are_an_error(monkeypatch, error):
    monkeypatch.setitem(pretrained.RESNET_WEIGHTS, "resnet18", FakeWeights(error))
    with pytest.raises(FileNotFoundError, match="--pretrain-backbone no"):
        build_model("resnet18", 2, pretrained=True)


def test_efficientnet_weights_without_timm_are_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FileNotFoundError, match=r"pip install timm.*--pretrain-backbone no"):
        build_model("efficientnet_lite0", 2, pretrained=True)


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "efficientnet_lite1"])
def test_timm_weights_give_timms_features(backbone):
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install timm)")
    theirs = timm.create_model(backbone).eval()
    for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, std=0.3)
    ours = BACKBONES[backbone].builder(0.01, 1e-5).eval()
    state = rename_timm(theirs.state_dict())
    ours.load_state_dict({n: v for n, v in state.items() if not n.startswith(CLASSIFIER_PREFIXES)})
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        deepest = theirs.blocks(theirs.bn1(theirs.conv_stem(image)))
        torch.testing.assert_close(ours(image)[-1], deepest)
