"""Checkpoint files: what is written comes back, what is foreign or broken is one clear error."""

import os
import pickle
import stat
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utils import checkpoint as module_under_test
from utils.checkpoint import load_checkpoint, save_checkpoint

# ---- writing ----


def test_what_is_saved_comes_back(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "progress": {"epoch": 3, "best": float("nan"), "none": None, "flag": True},
        "args": {"viz": ["policy"], "betas": (0.5, 0.999), "name": "x"},
    }
    save_checkpoint(tmp_path / "sub" / "a.pth", state)
    loaded = load_checkpoint(tmp_path / "sub" / "a.pth")
    torch.testing.assert_close(loaded["model"], dict(model.state_dict()), rtol=0, atol=0)
    assert torch.equal(loaded["rng"], state["rng"])
    assert loaded["args"] == state["args"]
    assert loaded["progress"]["epoch"] == 3
    assert loaded["optimizer"].keys() == {"state", "param_groups"}
    torch.testing.assert_close(loaded["optimizer"]["state"], optimizer.state_dict()["state"])
    optimizer.load_state_dict(loaded["optimizer"])


def test_writing_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.pth"
    for epoch in (1, 2):
        save_checkpoint(path, {"epoch": epoch})
    assert load_checkpoint(path) == {"epoch": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_others_may_read_what_the_umask_allows(tmp_path):
    previous = os.umask(0o022)
    try:
        save_checkpoint(tmp_path / "a.pth", {"epoch": 1})
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "a.pth").stat().st_mode) == 0o644


@pytest.mark.parametrize("step", ["save", "fsync", "replace"])
def test_a_failed_write_keeps_the_previous_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"epoch": 1})

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    owner = torch if step == "save" else module_under_test.os
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"epoch": 2})
    monkeypatch.undo()
    assert load_checkpoint(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.skipif(os.name != "posix", reason="limits of file size are those of POSIX")
def test_a_full_disk_is_an_oserror(tmp_path):
    import resource
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(OSError, match=r"cannot write the checkpoint .*a\.pth"):
            save_checkpoint(tmp_path / "a.pth", {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, Path("x")]}, r"state\['a'\]\[1\] is a pathlib"),
        ({"a": {"b": np.float64(1)}}, r"state\['a'\]\['b'\] is a numpy\.float64"),
        ({"net": nn.Linear(1, 1)}, r"state\['net'\] is a torch\.nn"),
        ({(1, Path("x")): 1}, r"a key of state\[1\] is a pathlib"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, value, where):
    with pytest.raises(TypeError, match=where):
        save_checkpoint(tmp_path / "a.pth", value)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_and_its_copy(tmp_path):
    path, best = tmp_path / "a.pth", tmp_path / "best.pth"
    save_checkpoint(path, {"epoch": 1}, also=best)
    assert load_checkpoint(path) == load_checkpoint(best) == {"epoch": 1}
    save_checkpoint(path, {"epoch": 2})
    assert load_checkpoint(path) == {"epoch": 2}
    assert load_checkpoint(best) == {"epoch": 1}
    save_checkpoint(path, {"epoch": 3}, also=best)
    path.write_bytes(b"")
    assert load_checkpoint(best) == {"epoch": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "best.pth"]


def test_a_copy_that_cannot_be_written_keeps_nothing_else_back(tmp_path):
    path, best = tmp_path / "a.pth", tmp_path / "missing" / "best.pth"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(OSError, match=r"best\.pth .*make room"):
        save_checkpoint(path, {"epoch": 2}, keep_previous=True, also=best)
    assert load_checkpoint(path) == {"epoch": 2}
    assert load_checkpoint(tmp_path / "a_previous.pth") == {"epoch": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "a_previous.pth"]


# ---- reading what is foreign or broken ----


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_runs_code_is_refused(tmp_path, zipped):
    path, marker = tmp_path / "a.pth", tmp_path / "ran"
    state = {"model": {"w": torch.ones(2)}, "extra": RunsCode(marker)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.pth is refused.*run code \(\w+\.mkdir\)") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it would have run


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"refused.*torch\.nn.*save state dicts"):
        load_checkpoint(tmp_path / "a.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*exp.*best\.pth"):
        load_checkpoint(tmp_path / "exp" / "best.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path)


FOREIGN = {
    "empty": b"",
    "text": b"hello world\n" * 50,
    "png": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "zip": b"PK\x05\x06" + bytes(18),
    "pickle": pickle.dumps({"a": 1}),
    "random": np.random.default_rng(0).bytes(3000),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_files_are_no_checkpoints(tmp_path, kind):
    (tmp_path / "a.pth").write_bytes(FOREIGN[kind])
    with pytest.raises(ValueError, match=r"a\.pth is not a checkpoint"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.99])
def test_truncated_checkpoint_is_an_error(tmp_path, zipped, part):
    path = tmp_path / "a.pth"
    torch.save(
        {"model": {"w": torch.ones(5000)}, "epoch": 1}, path, _use_new_zipfile_serialization=zipped
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"a\.pth is not a checkpoint, or is truncated"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_checkpoints_raise_nothing_but_valueerror(tmp_path, zipped):
    path = tmp_path / "a.pth"
    state = {"model": OrderedDict(w=torch.ones(3)), "score": np.float64(1), "list": [1, (2, "x")]}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for position in random.integers(len(whole), size=4):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except ValueError:
            refused += 1
    assert refused > 20


def test_a_bare_tensor_is_no_checkpoint(tmp_path):
    torch.save(torch.ones(3), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds a Tensor"):
        load_checkpoint(tmp_path / "a.pth")


class HidesItems:
    def __reduce__(self):
        return OrderedDict, (), {"items": None}, None, iter([("a", 1)])


def test_items_cannot_be_hidden_behind_an_attribute(tmp_path):
    torch.save({"state": HidesItems()}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth") == {"state": {"a": 1}}
