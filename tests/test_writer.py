"""Checkpoints that are written while training goes on."""

import errno
import os
import threading
import time

import pytest
import torch
from tiny import DEVICES

from utils.checkpoint import load_checkpoint, previous
from utils.training import writer
from utils.training.writer import CheckpointWriter


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
        assert i < 3 or (tmp_path / f"{i - 3}.pth").exists(), "one is under way, two wait"
    own.write(tmp_path / "0.pth", {"a": torch.zeros(1)}, True)
    own.wait()
    for i, state in enumerate(states[1:], 1):
        found = load_checkpoint(tmp_path / f"{i}.pth")
        assert all(torch.equal(found[name], value.cpu()) for name, value in state.items())
    assert torch.equal(load_checkpoint(tmp_path / "0_previous.pth")["b"], torch.arange(3))


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_keep_their_layout(tmp_path, device):
    """Moments in another than the weights' are refused by the fused optimisers."""
    own, weight = CheckpointWriter(), torch.randn(4, 3, 5, 5, device=device)
    for layout in (torch.channels_last, torch.contiguous_format):
        state = {"x": weight.to(memory_format=layout), "every second": weight[:, ::2]}
        own.write(tmp_path / "a.pth", state)
        own.wait()
        found = load_checkpoint(tmp_path / "a.pth")
        assert found["x"].is_contiguous(memory_format=layout)
        assert all(torch.equal(found[name], value.cpu()) for name, value in state.items())


@pytest.fixture
def full_disk(monkeypatch):
    """As long as this set is not empty nothing can be written."""
    reasons, save = {"full"}, writer.save_checkpoint

    def save_or_not(*given):
        if reasons:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*given)

    monkeypatch.setattr(writer, "save_checkpoint", save_or_not)
    return reasons


def test_what_failed_is_raised_once(tmp_path, full_disk):
    own = CheckpointWriter()
    own.write(tmp_path / "a.pth", {})
    with pytest.raises(OSError, match="No space left"):
        own.wait()
    own.wait()
    assert not own.has_failed
    assert not list(tmp_path.iterdir())


def test_the_write_after_a_failure_is_tried(tmp_path, full_disk):
    own = CheckpointWriter()
    assert own.write(tmp_path / "a.pth", {"x": 1}) is None
    while not own.has_failed:
        time.sleep(0.01)
    with pytest.raises(OSError, match="No space left"):
        own.write(tmp_path / "a.pth", {"x": 2})
    own.write(tmp_path / "a.pth", {"x": 3})
    while not own.has_failed:
        time.sleep(0.01)
    full_disk.clear()
    assert "No space left" in str(own.write(tmp_path / "a.pth", {"x": 4}))
    assert load_checkpoint(tmp_path / "a.pth") == {"x": 4}
    assert not own.has_failed


@pytest.mark.parametrize("device", DEVICES)
def test_a_newer_state_takes_the_place_of_one_that_waits(tmp_path, held, device):
    own, path = CheckpointWriter(), tmp_path / "a.pth"
    for x in range(4):
        own.write(path, {"x": torch.full((3,), x, device=device)}, keep_previous=True)
    held.set()
    own.wait()
    assert load_checkpoint(path)["x"].tolist() == [3, 3, 3]
    assert load_checkpoint(previous(path))["x"].tolist() == [0, 0, 0]


def test_what_has_another_purpose_is_not_replaced(tmp_path, held):
    """Nor is it waited for, which would take the minute that `held` allows, and fail."""
    own, names = CheckpointWriter(), ("a", "best", "c")
    own.write(tmp_path / "a", {"x": 0})
    own.write(tmp_path / "c", {"x": 1})  # another file; gives way to the next
    own.write(tmp_path / "c", {"x": 2}, also=tmp_path / "best")
    own.write(tmp_path / "c", {"x": 3})
    own.write(tmp_path / "c", {"x": 4})
    held.set()
    own.wait()
    assert [load_checkpoint(tmp_path / name)["x"] for name in names] == [0, 2, 4]


def test_a_newer_best_state_takes_the_place_of_one_that_waits(tmp_path, held):
    own, best = CheckpointWriter(), tmp_path / "best"
    for x in range(5):
        own.write(tmp_path / "a", {"x": x}, also=best)
    held.set()
    own.wait()
    assert [load_checkpoint(path)["x"] for path in (tmp_path / "a", best)] == [4, 4]


def test_the_best_and_an_average_of_weights_take_turns(tmp_path, held):
    """Whatever waits gives way to what replaces it, not only the last."""
    own = CheckpointWriter()
    own.write(tmp_path / "a", {"x": 0})
    for x in range(1, 5):
        own.write(tmp_path / "average", {"x": x})
        own.write(tmp_path / "a", {"x": x}, also=tmp_path / "best")
    held.set()
    own.wait()
    assert [load_checkpoint(tmp_path / name)["x"] for name in ("average", "a", "best")] == [4, 4, 4]


def test_a_failure_is_told_unless_later_writes_make_up_for_it(tmp_path, held):
    own, missing = CheckpointWriter(), tmp_path / "missing" / "best"
    own.write(tmp_path / "a", {"x": 0}, also=missing)
    own.write(tmp_path / "a", {"x": 1})
    held.set()
    with pytest.raises(OSError, match="missing"):
        own.wait()
    assert load_checkpoint(tmp_path / "a") == {"x": 1}
    held.clear()
    own.write(tmp_path / "a", {"x": 2}, also=missing)
    own.write(tmp_path / "b", {"x": 2})
    held.set()
    (tmp_path / "missing").mkdir()
    own.write(tmp_path / "a", {"x": 3}, also=missing)
    own.wait()
    assert load_checkpoint(missing) == {"x": 3}


def test_more_than_two_that_wait_are_waited_for(tmp_path, held):
    own, names = CheckpointWriter(), ("a", "b", "c", "d")
    for x, name in enumerate(names[:3]):
        own.write(tmp_path / name, {"x": x})
    threading.Timer(0.2, held.set).start()
    own.write(tmp_path / "d", {"x": 3})
    assert held.is_set()
    own.wait()
    assert [load_checkpoint(tmp_path / name)["x"] for name in names] == [0, 1, 2, 3]


def test_a_replaced_state_still_protects_the_good_file_before(tmp_path, held):
    """Of two that were to follow a damaged file, the first was to leave the older one alone."""
    own, path = CheckpointWriter(), tmp_path / "a.pth"
    previous(path).write_bytes(b"good")
    path.write_bytes(b"damaged")
    own.write(tmp_path / "other.pth", {})
    own.write(path, {"x": 1}, keep_previous=False)
    own.write(path, {"x": 2}, keep_previous=True)
    held.set()
    own.wait()
    assert load_checkpoint(path) == {"x": 2}
    assert previous(path).read_bytes() == b"good"


def test_a_failure_before_a_write_that_went_well_is_returned(tmp_path, held, monkeypatch):
    own, save = CheckpointWriter(), writer.save_checkpoint

    def fails_once(path, state, *given):
        save(path, state, *given)
        if state["x"] == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "save_checkpoint", fails_once)
    own.write(tmp_path / "a.pth", {"x": 1})
    own.write(tmp_path / "a.pth", {"x": 2})
    held.set()
    while not own._writes[0].has_failed:
        time.sleep(0.01)
    assert "No space left" in str(own.write(tmp_path / "a.pth", {"x": 3}))
    assert load_checkpoint(tmp_path / "a.pth") == {"x": 3}


def test_an_interrupted_wait_forgets_nothing(tmp_path, held, monkeypatch):
    own = CheckpointWriter()
    own.write(tmp_path / "a.pth", {"x": 1})

    def interrupt(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            own.wait()
    held.set()
    own.wait()
    assert load_checkpoint(tmp_path / "a.pth") == {"x": 1}


def test_writers_of_a_process_take_turns(tmp_path, monkeypatch):
    """Two files on their way to one name would be one."""
    save, together, most = writer.save_checkpoint, [], []

    def note(*given):
        together.append(given)
        most.append(len(together))
        time.sleep(0.1)
        save(*given)
        together.pop()

    monkeypatch.setattr(writer, "save_checkpoint", note)
    writers = [CheckpointWriter() for _ in range(3)]
    for own in writers:
        own.write(tmp_path / "a.pth", {"x": 1})
    for own in writers:
        own.wait()
    assert most == [1, 1, 1]


def test_a_state_that_could_not_be_read_again_is_an_error(tmp_path):
    own = CheckpointWriter()
    own.write(tmp_path / "a.pth", {"x": object()})
    with pytest.raises(TypeError, match="x"):
        own.wait()
