"""Weights into a model, and every way in which they do not fit."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import segblocks
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint


class Segmenter(nn.Module):
    """A small network whose last layer is named as SwiftNet's."""

    def __init__(self, classes: int = 3, width: int = 4):
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3)
        self.logits = nn.ModuleDict({"conv": nn.Conv2d(width, classes, 1)})


class PolicyNet(nn.Module):
    """The layers of the published policy network, by name."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for kernel, features in ((7, 64), (5, 64), (5, 64)):
            layers += [nn.Conv2d(channels, features, kernel, bias=False)]
            layers += [nn.BatchNorm2d(features), nn.ReLU()]
            channels = features
        self.policy_net = nn.ModuleDict(
            {"layers": nn.Sequential(*layers, nn.Conv2d(channels, 1, 5))}
        )


class Model(nn.Module):
    def __init__(self, net: nn.Module | None = None, policy: nn.Module | None = None):
        super().__init__()
        self.net = Segmenter() if net is None else net
        self.policy = nn.Module() if policy is None else policy


def learnt() -> Model:
    return Model(policy=PolicyNet())


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert len(a) > 0
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- other numbers than Python's ----


@pytest.mark.parametrize("scalar", [np.float32(0.25), np.int32(-7), np.bool_(True), np.uint8(200)])
def test_numpy_scalars_arrive_as_python_numbers(tmp_path, scalar):
    torch.save({"x": scalar}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")["x"]
    assert loaded == scalar.item()
    assert type(loaded) is type(scalar.item())


@pytest.mark.parametrize("value", [np.ones(3), np.datetime64("2020-01-01"), np.complex128(1j)])
def test_other_numpy_objects_are_refused(tmp_path, value):
    torch.save({"x": value}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is"):
        load_checkpoint(tmp_path / "a.pth")


# ---- weights into a model ----


@pytest.mark.parametrize("entry", ["model", "state_dict", None])
def test_weights_load_from_every_layout(tmp_path, entry):
    source, target = learnt(), learnt()
    weights = source.state_dict()
    torch.save(weights if entry is None else {entry: weights, "epoch": 1}, tmp_path / "a.pth")
    load_weights(target, tmp_path / "a.pth")
    assert_same(target.state_dict(), snapshot(source))


def test_half_precision_weights_load_into_single_precision(tmp_path):
    source, target = learnt(), learnt()
    weights = {n: v.half() if v.is_floating_point() else v for n, v in source.state_dict().items()}
    save_checkpoint(tmp_path / "a.pth", {"model": weights})
    load_weights(target, tmp_path / "a.pth")
    for name, value in target.state_dict().items():
        assert value.dtype == source.state_dict()[name].dtype
        assert torch.equal(value, weights[name].to(value.dtype))


@pytest.mark.parametrize("name", ["disabled", "random", "middle", "heuristic", "oracle"])
def test_policy_network_is_dropped_for_a_policy_without_parameters(tmp_path, caplog, name):
    source = learnt()
    target = segblocks.SegBlocksModel(Segmenter(), segblocks.build_policy(name))
    save_checkpoint(tmp_path / "a.pth", {"model": source.state_dict()})
    with caplog.at_level(logging.INFO):
        load_weights(target, tmp_path / "a.pth")
    assert_same(target.net.state_dict(), snapshot(source.net))
    assert "its policy network is not used" in caplog.text


@pytest.mark.parametrize("name", ["threshold", "place"])
def test_what_published_policies_lack_comes_along_and_is_0_where_there_is_none(tmp_path, name):
    source, target = (
        segblocks.SegBlocksModel(Segmenter(), segblocks.build_policy("reinforce", 64))
        for _ in range(2)
    )
    ours, found = (getattr(model.policy, name) for model in (source, target))
    ours.fill_(0.7)
    weights = source.state_dict()
    save_checkpoint(tmp_path / "own.pth", {"model": weights})
    published = without(weights, f"policy.{name}")
    save_checkpoint(tmp_path / "published.pth", {"model": published})
    load_weights(target, tmp_path / "own.pth")
    assert torch.equal(found, ours)
    load_weights(target, tmp_path / "published.pth")
    assert not found.any()
    found.fill_(0.7)
    target.load_state_dict(published)
    assert not found.any()


def test_policy_of_another_shape_is_an_error(tmp_path):
    source = learnt()
    source.policy.policy_net["layers"][0] = nn.Conv2d(3, 64, 5, bias=False)
    save_checkpoint(tmp_path / "a.pth", {"model": source.state_dict()})
    with pytest.raises(ValueError, match=r"1 of another shape \(policy\.policy_net\.layers\.0"):
        load_weights(learnt(), tmp_path / "a.pth")


def test_checkpoint_without_a_policy_network_is_an_error(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": Model().state_dict()})
    model = learnt()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has no policy network.*--segblocks-policy"):
        load_weights(model, tmp_path / "a.pth")
    assert_same(model.state_dict(), before)


def without(weights: dict, name: str) -> dict:
    return {n: v for n, v in weights.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "net.backbone.bias"), r"1 missing \(net\.backbone\.bias\)"),
        (lambda w: {**w, "net.x": torch.ones(1)}, r"1 unexpected \(net\.x\)"),
        (
            lambda w: {**w, "net.backbone.bias": torch.ones(9)},
            r"1 of another shape \(net\.backbone\.bias \(9,\) for \(4,\)\)",
        ),
        (
            lambda w: {f"module.{n}": v for n, v in w.items()},
            r"4 missing \(net\..*\); 4 unexpected \(module\..*\)",
        ),
        (
            lambda w: w | {f"net.x{i}": torch.ones(1) for i in range(12)},
            r"12 unexpected \(net\.x0, .*net\.x9 and 2 more\)",
        ),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_as_it_was(tmp_path, change, message):
    model = Model()
    before = snapshot(model)
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "a.pth", {"model": change(weights)})
    flags = r"--backbone.*--segblocks-policy.*--dataset"
    with pytest.raises(ValueError, match=rf"a\.pth does not fit.*{message}.*{flags}") as caught:
        load_weights(model, tmp_path / "a.pth")
    assert "\n" not in str(caught.value)
    assert_same(model.state_dict(), before)


def test_another_number_of_classes_has_its_own_message(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": Model(net=Segmenter(19)).state_dict()})
    message = r"trained for 19 classes, this network has 11; check --dataset"
    with pytest.raises(ValueError, match=message):
        load_weights(Model(net=Segmenter(11)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(Model(net=Segmenter(11, width=5)), tmp_path / "a.pth")


@pytest.mark.parametrize("state", [{"epoch": 1}, {"model": {}}, {"model": 3}, {"model": {"a": 1}}])
def test_checkpoint_without_weights_is_an_error(tmp_path, state):
    save_checkpoint(tmp_path / "a.pth", state)
    with pytest.raises(ValueError, match=r"a\.pth holds no weights"):
        load_weights(Model(), tmp_path / "a.pth")


def test_classifier_keys_are_dropped_by_name_only(tmp_path):
    model = Model()
    for name, fine in (("backbone.head.0.weight", True), ("backbone.headless.weight", False)):
        extra = {**model.state_dict(), f"net.{name}": torch.ones(1)}
        save_checkpoint(tmp_path / "a.pth", {"model": extra})
        if fine:
            load_weights(model, tmp_path / "a.pth")
        else:
            with pytest.raises(ValueError, match="headless"):
                load_weights(model, tmp_path / "a.pth")
