"""scripts/scaling.py times the training steps of processes that share each batch."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import REINFORCE, SYNTHETIC, make_trainer, tiny_backbone  # noqa: F401

from utils.speed.scaling import measure

SCRIPT = Path(__file__).parents[1] / "scripts" / "scaling.py"
SMALL = "--synthetic-size 64 128 --res 128 --crop-res 64 --device cpu".split()


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("tiny_backbone")
def test_steps_on_one_batch_are_training_steps(tmp_path):
    trainer = make_trainer(tmp_path, *REINFORCE)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batch = next(iter(trainer.train_loader))
    trainer.train_on(batch, 2)
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    assert trainer.progress.total_steps == 0


@pytest.mark.usefixtures("tiny_backbone")
def test_one_process_is_measured():
    figures = measure([*SYNTHETIC, *REINFORCE], images=3, warm_up=0, steps=1)
    assert figures["processes"] == 1
    assert len(figures["rounds"]) == 5
    assert figures["images_per_second"] == sorted(figures["rounds"])[2] > 0


def test_two_processes_are_started_and_told_of(scaling, tmp_path, capsys):
    own = "--processes 1 2 --images 1 --warm-up 0 --steps 1".split()
    assert scaling.main([*own, "--json", str(tmp_path / "s.json"), "--", *SMALL]) == 0
    runs = json.loads((tmp_path / "s.json").read_text())["runs"]
    assert [run["processes"] for run in runs] == [1, 2]
    lines = capsys.readouterr().out.splitlines()  # each when it is known, then a table
    assert [line.split()[0] for line in lines] == ["1", "2", "processes", "1", "2"]


def test_rates_are_compared_with_as_many_times_the_first(scaling):
    run = {"reserved_memory_mib": None}
    runs = [
        {"processes": 2, "images_per_second": 200.0, **run},
        {"processes": 4, "images_per_second": 360.0, **run},
    ]
    assert [line.split()[2] for line in scaling.table(runs)[1:]] == ["100.0", "90.0"]


@pytest.mark.parametrize("wrong", ["--processes 0", "--steps 0", "--warm-up -1"])
def test_senseless_numbers_are_refused(scaling, wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(wrong.split())
    assert "at least" in capsys.readouterr().err


def test_the_batch_size_follows_from_the_images(scaling, capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--", "--batch-size", "8"])
    assert "give --images" in capsys.readouterr().err


def test_what_was_measured_before_a_failure_is_kept(scaling, tmp_path, monkeypatch, capsys):
    one = {"processes": 1, "images_per_second": 9.0, "reserved_memory_mib": None}
    monkeypatch.setattr(scaling, "started", lambda args, count, flags: one if count == 1 else None)
    assert scaling.main(["--processes", "1", "2", "4", "--json", str(tmp_path / "s.json")]) == 1
    assert json.loads((tmp_path / "s.json").read_text())["runs"] == [one]
    told = capsys.readouterr()
    assert "2 processes failed" in told.err
    assert [line.split()[0] for line in told.out.splitlines()] == ["1", "processes", "1"]


def test_a_process_that_fails_is_noticed(scaling, capfd):
    assert scaling.main(["--processes", "1", "--", "--no-such-flag"]) == 1
    assert "1 processes failed" in capfd.readouterr().err
