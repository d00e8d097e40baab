"""Checkpoints of the published release: read without its classes, strictly loaded, used as such."""

import hashlib
import os
import sys
from argparse import Namespace

import pytest
import torch
from experiments import ROOT, called, run_script
from published import BACKBONES, published_state
from tiny import checkpoint, figures, make_cityscapes

import segblocks
from models import build_model
from utils.checkpoint import load_checkpoint, load_weights
from utils.published import settle_upsampling

VAL = ROOT / "configs/cityscapes/swiftnet_rn18/reinforce40_val.sh"
TRAIN = ROOT / "configs/cityscapes/swiftnet_rn18/reinforce40_train.sh"
NAME = "cityscapes/swiftnet_rn18/reinforce40"
TOLD = "published weights: each block is resized on its own (--segblocks-legacy-upsample yes)"
FLAGS = "--cityscapes-data-dir data --exp-dir exp --device cpu --num-workers 0".split()


def build(backbone: str) -> segblocks.SegBlocksModel:
    net = build_model(backbone, 19)
    return segblocks.SegBlocksModel(net, segblocks.build_policy("reinforce"))


# ---- reading and loading ----


@pytest.mark.parametrize("zipped", [True, False])
def test_arrive_as_plain_containers(tmp_path, monkeypatch, easydict, zipped):
    path = tmp_path / "a.pth"
    torch.save(published_state("resnet18", easydict), path, _use_new_zipfile_serialization=zipped)
    monkeypatch.setitem(sys.modules, "easydict", None)  # importing it now fails
    allowed = set(torch.serialization.get_safe_globals())
    loaded = load_checkpoint(path)
    progress = {"epoch": 350, "score": 0.762, "count": -5, "flops": None}
    assert loaded["progress"] == progress
    assert loaded["config"] == {"lr": 4e-4, "nested": {"name": "x"}, "sizes": [{"a": 1}]}
    for value in (loaded["progress"], loaded["config"]["nested"], loaded["config"]["sizes"][0]):
        assert type(value) is dict
    assert type(loaded["progress"]["score"]) is float
    assert type(loaded["progress"]["count"]) is int
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_weight_is_loaded(tmp_path, easydict, backbone):
    state = published_state(backbone, easydict)
    torch.save(state, tmp_path / "a.pth")
    model = build(backbone)
    loaded = load_weights(model, tmp_path / "a.pth")
    assert loaded["progress"]["epoch"] == 350
    unused = ("net.backbone.head.", "net.backbone.fc.")
    weights = {n: v for n, v in state["state_dict"].items() if not n.startswith(unused)}
    assert len(weights) > 200
    state = model.state_dict()
    for name, value in weights.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("net.spp.spp.spp0.conv.weight"), r"1 missing \(net\.spp\.spp\.spp0\.conv"),
        (lambda w: w.update({"net.extra": torch.ones(1)}), r"1 unexpected \(net\.extra\)"),
        (
            lambda w: w.update({"policy.policy_net.layers.9.bias": torch.ones(2)}),
            r"policy\.policy_net\.layers\.9\.bias \(2,\) for \(1,\)",
        ),
    ],
    ids=["missing", "unexpected", "reshaped"],
)
def test_what_does_not_fit_is_listed(tmp_path, easydict, backbone, change, message):
    state = published_state(backbone, easydict)
    change(state["state_dict"])
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(build(backbone), tmp_path / "a.pth")


# ---- the resizing they were trained with ----


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize(
    ("state", "trained"),
    [
        ({"state_dict": {}, "config": {}}, True),
        ({"state_dict": {}, "args": {"segblocks_legacy_upsample": True}}, True),
        ({"state_dict": {}, "args": {"segblocks_legacy_upsample": False}}, False),
        ({"state_dict": {}, "args": {}}, False),
        ({"state_dict": {}}, False),
        ({}, False),
    ],
)
def test_resizing_is_as_trained_unless_given(given, state, trained):
    args = Namespace(segblocks_legacy_upsample=given)
    policy = segblocks.build_policy("middle")
    model = segblocks.SegBlocksModel(torch.nn.Identity(), policy, legacy_upsample=bool(given))
    told = settle_upsampling(model, args, state)
    expected = trained if given is None else given
    assert (model.legacy_upsample, args.segblocks_legacy_upsample) == (expected, expected)
    assert len(told) == (given is None and trained)


def test_a_dense_network_tells_nothing_of_resizing():
    model = segblocks.SegBlocksModel(torch.nn.Identity(), segblocks.build_policy("disabled"))
    state = {"state_dict": {}, "config": {}}
    assert settle_upsampling(model, Namespace(segblocks_legacy_upsample=None), state) == []


# ---- through the experiment scripts ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_cityscapes(tmp_path / "data")
    return tmp_path / "exp" / NAME


@pytest.fixture
def released(folder, easydict, monkeypatch):
    """A file in the place where the release put it; easydict is gone again."""
    folder.mkdir(parents=True)
    torch.save(published_state("resnet18", easydict), folder / "checkpoint_best.pth")
    monkeypatch.delitem(sys.modules, "easydict")
    return folder / "checkpoint_best.pth"


def test_script_validates_a_released_file(folder, released, tmp_path):
    done = called(VAL, *FLAGS, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert TOLD in done.stdout
    assert TOLD in (folder / "run.log").read_text()
    values = figures(folder, "val.json")
    assert values["images"] == 1
    assert 0 < values["overall_accuracy"] < 1
    assert values["gmacs"] > 0


def test_resizing_can_be_chosen(folder, released, capsys):
    accuracy = {}
    for flags in ("", "--segblocks-legacy-upsample yes", "--segblocks-legacy-upsample no"):
        assert run_script(VAL, *FLAGS, *flags.split(), "--budget", "0.5") == 0
        assert (TOLD in capsys.readouterr().out) is (flags == "")
        accuracy[flags[-3:]] = figures(folder, "val.json")["overall_accuracy"]
    assert accuracy[""] == accuracy["yes"] != accuracy[" no"]


def test_a_file_elsewhere_takes_the_place_of_the_best(folder, released, capsys):
    elsewhere = released.rename("elsewhere.pth")
    assert run_script(VAL, *FLAGS, "--resume", str(elsewhere)) == 0
    assert f"validating {elsewhere}" in capsys.readouterr().out
    assert run_script(VAL, *FLAGS) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_an_address_takes_the_place_of_the_best(folder, released, server, capsys):
    digest = hashlib.sha256(released.read_bytes()).hexdigest()
    address = f"{server.url('/rn18.pth', released.read_bytes())}#sha256={digest}"
    released.unlink()
    for _ in range(2):
        assert run_script(VAL, *FLAGS, "--resume", address) == 0
        said = capsys.readouterr().out
        assert f"validating {address}" in said
        assert TOLD in said
    assert server.asked() == [None]
    assert figures(folder, "val.json")["checkpoint"] == address


def test_training_begins_with_released_weights(folder, released, capsys):
    tiny = "--res 512 --crop-res 128 --batch-size 2 --max-steps 1 --lr 1e-30".split()
    assert run_script(TRAIN, *FLAGS, *tiny, "--resume", str(released)) == 0  # no ImageNet weights
    said = capsys.readouterr().out
    assert "optimiser and schedule start afresh" in said
    assert TOLD in said
    state = checkpoint(folder)
    assert state["args"]["segblocks_legacy_upsample"] is True
    assert state["progress"]["total_steps"] == 1
    assert run_script(VAL, *FLAGS, "--resume", "auto") == 0
    said = capsys.readouterr().out
    assert "weights trained in this way: each block is resized on its own" in said


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_hostile_file_is_refused(folder, easydict, capsys, tmp_path):
    state = published_state("resnet18", easydict)
    state["config"]["hook"] = RunsCode()
    torch.save(state, "hostile.pth")
    assert run_script(VAL, *FLAGS, "--resume", "hostile.pth") == 1
    assert "hostile.pth is refused: it asks to run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not folder.exists()


@pytest.mark.parametrize("part", [0.3, 0.999])
def test_a_truncated_file_is_refused(folder, released, capsys, part):
    whole = released.read_bytes()
    released.write_bytes(whole[: int(part * len(whole))])
    assert run_script(VAL, *FLAGS) == 1
    assert "checkpoint_best.pth is not a checkpoint, or is truncated" in capsys.readouterr().err
    assert not (folder / "run.log").exists()
