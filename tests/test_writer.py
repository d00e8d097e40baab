"""Checkpoints that are written while training goes on."""

import errno
import os
import threading

import pytest
import torch

from utils import writer
from utils.checkpoint import load_checkpoint
from utils.writer import CheckpointWriter

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@pytest.fixture
def held(monkeypatch):
    """An event without which nothing is written."""
    event, save = threading.Event(), writer.save_checkpoint

    def save_later(*given):
        assert event.wait(60)
        save(*given)

    monkeypatch.setattr(writer, "save_checkpoint", save_later)
    return event


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_written_is_the_state_at_the_call(tmp_path, held, device):
    weight, counts = torch.zeros(3, 4, device=device), [torch.ones(2), 5]
    own, path = CheckpointWriter(), tmp_path / "a.pth"
    own.write(path, {"model": {"weight": weight}, "counts": counts})
    weight.add_(1)
    counts[0].add_(1)
    counts[1] = 6
    assert not path.exists()
    held.set()
    own.wait()
    found = load_checkpoint(path)
    assert torch.equal(found["model"]["weight"], torch.zeros(3, 4))
    assert torch.equal(found["counts"][0], torch.ones(2))
    assert found["counts"][1] == 5


@pytest.mark.parametrize("device", DEVICES)
def test_one_after_the_other(tmp_path, device):
    """Each with its own tensors, whose shapes and number may change."""
    own = CheckpointWriter()
    states = [
        {"a": torch.full((n, 2), float(n), device=device), "b": torch.arange(n, device=device)}
        for n in (3, 3, 4, 1)
    ]
    for i, state in enumerate(states):
        own.write(tmp_path / f"{i}.pth", state)
        assert i == 0 or (tmp_path / f"{i - 1}.pth").exists(), "the one before has been written"
    own.write(tmp_path / "0.pth", {"a": torch.zeros(1)}, True)
    own.wait()
    for i, state in enumerate(states[1:], 1):
        found = load_checkpoint(tmp_path / f"{i}.pth")
        assert all(torch.equal(found[name], value.cpu()) for name, value in state.items())
    assert torch.equal(load_checkpoint(tmp_path / "0_previous.pth")["b"], torch.arange(3))


@pytest.mark.parametrize("then", ["wait", "write"])
def test_what_failed_is_raised_once(tmp_path, monkeypatch, then):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    own = CheckpointWriter()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_checkpoint", full)
        own.write(tmp_path / "a.pth", {})
        with pytest.raises(OSError, match="No space left"):
            own.wait() if then == "wait" else own.write(tmp_path / "b.pth", {})
    own.wait()
    assert not list(tmp_path.iterdir())
    own.write(tmp_path / "a.pth", {"x": 1})
    own.wait()
    assert load_checkpoint(tmp_path / "a.pth") == {"x": 1}


def test_a_state_that_could_not_be_read_again_is_an_error(tmp_path):
    own = CheckpointWriter()
    own.write(tmp_path / "a.pth", {"x": object()})
    with pytest.raises(TypeError, match="x"):
        own.wait()
