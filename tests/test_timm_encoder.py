"""Networks of timm as encoders of SwiftNet, dense and on blocks, and those that cannot be."""

import sys

import pytest
import torch
from agreement import distance
from definition import slow_execute, slow_no_blocks
from tiny import REINFORCE, arguments, figures, run
from torch import nn

import models.swiftnet
import train
from models import build_model
from segblocks import execute_with_grid

MIXED = torch.tensor([[[True, False], [False, True]]])
needs_timm = pytest.mark.usefixtures("timm")


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="timm is not installed: pip install timm")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(name: str) -> nn.Module:
    net = build_model(f"timm:{name}", 5).double().eval()
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.1, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return net


@needs_timm
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv2_035"])
@torch.no_grad()
def test_dense_and_on_blocks(name, monkeypatch):
    net, image = build(name), torch.randn(1, 3, 128, 128, dtype=torch.float64)
    dense = net(image)
    assert dense.shape == (1, 5, 32, 32)
    assert dense.std() > 1e-3
    assert distance(execute_with_grid(net, image, torch.ones_like(MIXED)), dense) < 1e-10
    mixed = execute_with_grid(net, image, MIXED)
    monkeypatch.setattr(models.swiftnet, "no_blocks", slow_no_blocks)
    assert distance(mixed, slow_execute(net, image, MIXED)) < 1e-10
    assert distance(mixed, dense) > 1e-3


def test_features_are_timms(timm):
    net = build_model("timm:test_resnet", 5).eval()
    whole = timm.create_model("test_resnet", features_only=True).eval()
    whole.load_state_dict(net.backbone.body.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for mine, theirs in zip(net.backbone(image), whole(image)[1:], strict=True):
            assert torch.equal(mine, theirs)
    assert net.logits.conv.in_channels == 128


def test_deeper_features_than_needed_are_not_built(timm):
    whole = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4))
    net = build_model("timm:tf_efficientnet_lite0", 5)
    assert net.backbone.body.state_dict().keys() == whole.state_dict().keys()


def test_pretrained_weights_are_loaded(timm, monkeypatch):
    original, state = timm.create_model, {}

    def create(name, pretrained=False, **options):
        model = original(name, **options)
        if pretrained:  # as if downloaded
            model.load_state_dict({n: v + 1 for n, v in model.state_dict().items()})
            state.update({n: v.clone() for n, v in model.state_dict().items()})
        return model

    monkeypatch.setattr(timm, "create_model", create)
    net = build_model("timm:test_resnet", 5, pretrained=True)
    assert len(state) > 50
    for name, value in net.backbone.body.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("backbone", ["timm:test_resnet", "efficientnet_lite0"])
def test_offline_error_names_the_way_out(timm, monkeypatch, backbone):
    hub = pytest.importorskip("huggingface_hub", reason="timm downloads through huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", "/nowhere")
    with pytest.raises(FileNotFoundError, match=r"ImageNet weights of .*--pretrain-backbone no"):
        build_model(backbone, 5, pretrained=True)


@needs_timm
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_vit", r"features at strides 16, 16, 16; SwiftNet reads strides 4, 8, 16, 32"),
        ("test_mambaout", r"makes features \(1, 16, 16, 16\).*not N,C,H,W at strides 4, 8, 16, 32"),
        ("coatnet_pico_rw_224", r"does not take images of any size"),
        ("resnet", r"has no network 'resnet'; similar: \w+"),
        ("hf-hub:someone/something", r"has no network"),
        ("resnet18.no_such_tag", r"timm gives no features of 'resnet18\.no_such_tag' \(Invalid"),
        ("lcnet_035", r"No pretrained weights exist"),
    ],
)
def test_what_does_not_fit_is_an_error(name, message):
    pretrained = name == "lcnet_035"
    error = FileNotFoundError if pretrained else ValueError
    with pytest.raises(error, match=message) as caught:
        build_model(f"timm:{name}", 5, pretrained)
    assert "\n" not in str(caught.value)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FileNotFoundError, match=r"timm:resnet10t needs.*pip install timm"):
        build_model("timm:resnet10t", 5)


@needs_timm
def test_trains_and_validates(tmp_path):
    flags = "--backbone", "timm:test_resnet", *REINFORCE
    folder = run(tmp_path, *flags, "--max-steps", "1")
    run(tmp_path, *flags, "--mode", "val")
    assert 0 <= figures(folder, "val.json")["miou"] <= 1


@needs_timm
def test_what_blocks_cannot_do_shows_before_training(tmp_path, capsys):
    argv = arguments(tmp_path, "--backbone", "timm:test_efficientnet", *REINFORCE)
    assert train.main(argv) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: --backbone timm:test_efficientnet cannot run on blocks ('mean'")
    assert line.endswith("choose another, or --segblocks-policy disabled\n")
    assert list(tmp_path.iterdir()) == []
    assert train.main([*argv, "--segblocks-policy", "disabled", "--max-steps", "1"]) == 0
