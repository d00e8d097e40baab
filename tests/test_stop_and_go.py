"""Runs that are killed, damaged or out of room go on without loss, or say what is wrong."""

import errno
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import Kill, run_job
from tiny import (  # noqa: F401
    REINFORCE,
    arguments,
    checkpoint,
    make_trainer,
    run,
    same,
    tiny_backbone,
)

import train
from argparser import parse_args
from utils import checkpoint as checkpoints
from utils.logger import RunLog
from utils.training.objective import Objective
from utils.training.resume import changed_flags

pytestmark = pytest.mark.usefixtures("tiny_backbone")

# Three epochs of three steps, saved after each and, by the clock, between any two steps.
SETTING = (*REINFORCE, "--epochs", "3", "--num-viz-images", "0")
EVERY_STEP = ("--save-minutes", "1e-9")
STATE = ("state_dict", "optimizer", "scheduler", "scaler", "reward", "rng")


def assert_equal_runs(one: Path, other: Path, *more: str) -> None:
    one, other = checkpoint(one), checkpoint(other)
    for entry in (*STATE, *more):
        assert same(one[entry], other[entry]), entry
    assert one["progress"] == other["progress"]
    assert one["progress"]["epoch"] == 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_backbone):  # noqa: F811
    """Folders of runs that nobody has stopped, by number of ranks."""
    folder = tmp_path_factory.mktemp("whole")
    for count in (1, 2):
        argv = arguments(folder / str(count), *SETTING, "--ema", "0.9")
        assert set(run_job(argv, count)) == {0}
    return {count: folder / str(count) / "default" for count in (1, 2)}


@pytest.mark.parametrize(("ranks", "seed"), [(1, 0), (1, 1), (2, 2)])
def test_killed_three_times_and_resumed_equals_a_run_left_alone(whole, tmp_path, ranks, seed):
    """SIGKILL in the middle of writing a checkpoint, then to a random rank at random steps."""
    draw = random.Random(seed)
    often = EVERY_STEP if seed % 2 else ()
    argv = arguments(tmp_path, *SETTING, *often, "--ema", "0.9")
    steps = sorted(draw.sample(range(4, 9), 3))
    kills = [Kill(1, while_saving=True), *(Kill(step, draw.randrange(ranks)) for step in steps)]
    for kill in kills:
        assert -9 in run_job(argv, ranks, kill)
    assert set(run_job(argv, ranks)) == {0}
    assert_equal_runs(whole[ranks], tmp_path / "default", "ema")
    assert not list(tmp_path.glob("default/.*.tmp"))


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_same_on_cuda(tmp_path, amp):
    flags = [*SETTING, *EVERY_STEP, "--device", "cuda", "--deterministic", "yes", "--amp", amp]
    left_alone, killed = (arguments(tmp_path / name, *flags) for name in ("whole", "killed"))
    assert run_job(left_alone) == [0]
    for step in (2, 5, 7):
        assert run_job(killed, kill=Kill(step)) == [-9]
    assert run_job(killed) == [0]
    assert_equal_runs(tmp_path / "whole/default", tmp_path / "killed/default")


def test_a_run_may_go_on_with_another_number_of_ranks(whole, tmp_path):
    """Draws and batches go on as they were; sums are rounded otherwise."""
    argv = arguments(tmp_path, *SETTING, "--ema", "0.9")
    assert run_job([*argv, "--max-steps", "4"], 2) == [0, 0]
    assert run_job(argv, 1) == [0]
    state = checkpoint(tmp_path / "default")
    assert same(state["rng"], checkpoint(whole[1])["rng"])
    assert state["progress"]["total_steps"] == 9


@pytest.mark.parametrize("number", ["TERM", "INT"])
def test_a_signal_to_all_ranks_stops_them_at_one_step(whole, tmp_path, number):
    argv = arguments(tmp_path, *SETTING, "--ema", "0.9")
    kill = Kill(4, signal=number)
    status = 128 + kill.signal_number
    assert run_job(argv, 2, kill) == [status, status]  # one rank has heard it, all have stopped
    assert 4 < checkpoint(tmp_path / "default")["progress"]["total_steps"] < 9
    assert run_job(argv, 2) == [0, 0]
    assert_equal_runs(whole[2], tmp_path / "default", "ema")


@pytest.mark.parametrize("number", ["TERM", "INT"])
def test_a_signal_to_the_process_group_leaves_the_data_workers_alone(whole, tmp_path, number):
    """As Ctrl-C in a terminal sends it, or torchrun, or timeout."""
    argv = arguments(tmp_path, *SETTING, "--ema", "0.9", "--num-workers", "2")
    kill = Kill(4, signal=number, group=True)
    assert run_job(argv, kill=kill) == [128 + kill.signal_number]
    assert 4 < checkpoint(tmp_path / "default")["progress"]["total_steps"] < 9
    assert run_job(argv) == [0]
    assert_equal_runs(whole[1], tmp_path / "default", "ema")


def test_validation_in_between_changes_no_weight(whole, tmp_path):
    flags = (*SETTING, "--ema", "0.9", "--val-every", "0")
    seldom = run(tmp_path, *flags)
    for entry in STATE:
        assert same(checkpoint(seldom)[entry], checkpoint(whole[1])[entry]), entry


# ---- damaged checkpoints ----


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    """One bit in the middle of the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, tmp_path, damage):
    folder = run(tmp_path, *SETTING, "--ema", "0.9", *EVERY_STEP, "--max-steps", "5")
    good = (folder / "checkpoint_previous.pth").read_bytes()
    assert checkpoint(folder, "checkpoint_previous.pth")["progress"]["total_steps"] == 4
    damage(folder / "checkpoint.pth")
    # A good checkpoint is never given up for a damaged one.
    run(tmp_path, *SETTING, "--ema", "0.9", "--max-steps", "5", "--save-minutes", "0")
    assert (folder / "checkpoint_previous.pth").read_bytes() == good
    run(tmp_path, *SETTING, "--ema", "0.9")
    log = (folder / "run.log").read_text()
    assert "checkpoint_previous.pth: epoch 2, step 1 of 3" in log
    if damage is not Path.unlink:
        assert "WARNING warning: " in log
        assert "is truncated or damaged" in log or "is not a checkpoint" in log
    assert_equal_runs(whole[1], folder, "ema")


def test_two_damaged_checkpoints_are_an_error(tmp_path, capsys):
    folder = run(tmp_path, *SETTING, "--max-steps", "2", *EVERY_STEP)
    for name in ("checkpoint.pth", "checkpoint_previous.pth"):
        _truncate(folder / name)
    assert train.main(arguments(tmp_path, *SETTING)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "checkpoint.pth is not a checkpoint, or is truncated" in line
    assert "checkpoint_previous.pth is not a checkpoint, or is truncated" in line
    (way_out,) = re.findall(r"--resume (\S*checkpoint_best.pth)", line)
    assert train.main(arguments(tmp_path, *SETTING, "--resume", way_out)) == 0


def test_a_named_damaged_checkpoint_is_an_error(tmp_path, capsys):
    folder = run(tmp_path, *SETTING, "--max-steps", "2", *EVERY_STEP)
    _truncate(folder / "checkpoint.pth")
    named = arguments(tmp_path, *SETTING, "--resume", str(folder / "checkpoint.pth"))
    assert train.main(named) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "truncated or damaged; --resume names another file" in line


# ---- disk full, memory full ----


def test_a_full_disk_keeps_the_old_checkpoint(whole, tmp_path, capsys):
    """On a real file system of a few megabytes, where one can be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    room = 5 * (whole[1] / "checkpoint.pth").stat().st_size + (1 << 20)
    if shutil.which("mount") is None or _mount(small, room):
        pytest.skip("cannot mount a small file system here (needs root): see the next test")
    try:
        folder = run(small, *SETTING, "--ema", "0.9", "--max-steps", "1")
        good = (folder / "checkpoint.pth").read_bytes()
        free = shutil.disk_usage(small).free
        (small / "filler").write_bytes(bytes(max(0, free - len(good) // 2)))
        assert train.main(arguments(small, *SETTING, "--ema", "0.9", "--max-steps", "2")) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "No space left on device" in line
        assert "the checkpoints before it are as they were" in line
        assert (folder / "checkpoint.pth").read_bytes() == good
        assert not list(folder.glob(".*.tmp"))
        (small / "filler").unlink()
        run(small, *SETTING, "--ema", "0.9", "--max-steps", "2")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _mount(folder: Path, size: int) -> int:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode


@pytest.mark.parametrize("step", ["fsync", "replace", "save"])
def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, capsys, monkeypatch, step):
    folder = run(tmp_path, *SETTING, "--max-steps", "1")
    good = (folder / "checkpoint.pth").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = torch if step == "save" else checkpoints.os
    monkeypatch.setattr(owner, step, full)
    assert train.main(arguments(tmp_path, *SETTING, "--max-steps", "2")) == 1
    monkeypatch.undo()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert "No space left on device" in line
    assert (folder / "checkpoint.pth").read_bytes() == good
    assert not list(folder.glob(".*.tmp"))


def test_out_of_gpu_memory_says_what_lowers_it(tmp_path, capsys, monkeypatch):
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Objective, "__call__", full)
    assert train.main(arguments(tmp_path)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "out of GPU memory: lower --batch-size" in line
    assert "--accumulate" in line
    assert "--amp bf16" in line


def test_an_epoch_is_saved_though_the_step_after_it_fails(tmp_path, monkeypatch):
    """It is written when that step has been launched."""
    loss_of, calls = Objective.__call__, []

    def fails_late(self, *given):
        calls.append(given)
        if len(calls) > 3:  # steps an epoch
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_of(self, *given)

    monkeypatch.setattr(Objective, "__call__", fails_late)
    flags = ("--epochs", "3", "--val-every", "0")
    assert train.main(arguments(tmp_path, *flags)) == 1
    (latest,) = tmp_path.rglob("checkpoint.pth")
    progress = checkpoint(latest.parent)["progress"]
    assert (progress["epoch"], progress["step"], progress["total_steps"]) == (1, 0, 3)
    assert "epoch 1/3, step 3/3: loss" in (latest.parent / "run.log").read_text()


# ---- weights that are not finite ----


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """A finite loss may still end in a step to nowhere, which no later loss has shown yet."""
    trainer = make_trainer(tmp_path)
    with RunLog(tmp_path / "run") as log:
        trainer.save(log)
        trainer.saver.wait()
        good = (tmp_path / "run" / "checkpoint.pth").read_bytes()
        with torch.no_grad():
            next(trainer.model.parameters())[0, 0, 0, 0] = torch.inf
        with pytest.raises(train.UserError, match=r"1 weights are not finite.*net\.backbone"):
            trainer.save(log)
    assert (tmp_path / "run" / "checkpoint.pth").read_bytes() == good


# ---- flags that have changed ----


def test_changed_rates_and_schedule_take_effect(tmp_path):
    flags = ("--val-every", "0", "--num-viz-images", "0")
    run(tmp_path, *flags, "--epochs", "4", "--max-steps", "3")
    folder = run(
        tmp_path, *flags, "--epochs", "2", "--lr", "1e-3", "--weight-decay", "0", "--max-steps", "4"
    )
    group = checkpoint(folder)["optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx((1e-3 + 1e-6) / 2)  # half way through two epochs
    assert group["weight_decay"] == 0
    log = (folder / "run.log").read_text()
    for text in (
        "--epochs was 4, now 2",
        "--lr was 0.0004, now 0.001",
        "--weight-decay was 0.0001",
    ):
        assert f"WARNING warning: changed since the checkpoint: {text}" in log


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ("", "--class-weights 1 2", ["--class-weights was None, now ['1', '2']"]),
        ("--segblocks-budgets 0.1 0.5", "", ["--segblocks-budgets was [0.1, 0.5], now None"]),
        ("", "--num-features 64", []),  # may be what the backbone has in any case
        ("--segblocks-legacy-upsample yes", "", []),  # the checkpoint's counts
        ("--num-features 48", "--num-features 64", ["--num-features was 48, now 64"]),
        ("--synthetic-size 64 128", "--synthetic-size 64 128", []),
        ("--cityscapes-data-dir here", "--cityscapes-data-dir there", []),
    ],
)
def test_flags_that_count_as_changed(before, now, expected):
    flags = (
        ["--dataset", "synthetic", "--segblocks-policy", "random", *f.split()]
        for f in (before, now)
    )
    saved, args = (parse_args(f) for f in flags)
    assert changed_flags(vars(saved), args) == expected


@pytest.mark.parametrize(
    ("before", "done", "after", "expected"),
    [("2", "2", "4", 1), ("1", "5", "2", 2), ("1", "5", "5", 1)],
)
def test_batches_of_another_size_go_on_about_as_far(tmp_path, before, done, after, expected):
    run(tmp_path, "--batch-size", before, "--max-steps", done)
    folder = run(tmp_path, "--batch-size", after, "--epochs", "2", "--val-every", "0")
    log = (folder / "run.log").read_text()
    assert f"checkpoint.pth: epoch 1, step {expected} of {6 // int(after)}" in log
    assert f"--batch-size was {before}, now {after}" in log
    assert checkpoint(folder)["progress"]["epoch"] == 2


@pytest.mark.parametrize(("before", "after"), [("off", "fp16"), ("fp16", "off")])
def test_mixed_precision_may_change(tmp_path, before, after, monkeypatch):
    run(tmp_path, "--amp", before, "--max-steps", "1")
    folder = run(tmp_path, "--amp", after, "--max-steps", "2")
    assert f"--amp was {before}, now {after}" in (folder / "run.log").read_text()
    assert bool(checkpoint(folder)["scaler"]) == (after == "fp16")


# ---- average of the weights ----


def test_average_of_weights_is_what_it_says(tmp_path):
    steps = []
    for n in (1, 2, 3):
        folder = run(tmp_path, "--ema", "0.9", "--max-steps", str(n), "--num-viz-images", "0")
        steps.append(checkpoint(folder))
    expected = dict(make_trainer(tmp_path).model.named_parameters())
    for n, state in enumerate(steps, 1):
        share = 1 - min(0.9, (1 + n) / (10 + n))
        for name, value in state["ema"].items():
            expected[name] = expected[name].detach().lerp(state["state_dict"][name], share)
            torch.testing.assert_close(value, expected[name], msg=name)
    best = checkpoint(folder, "checkpoint_ema_best.pth")
    assert best["state_dict"].keys() == state["state_dict"].keys()
    run(tmp_path, "--mode", "val", "--resume", str(folder / "checkpoint_ema_best.pth"))
    log = (folder / "run.log").read_text()
    assert "average of weights (" in log


def test_average_may_begin_in_the_middle(tmp_path):
    run(tmp_path, "--max-steps", "2")
    folder = run(tmp_path, "--max-steps", "3", "--ema", "0.5")
    state = checkpoint(folder)
    assert "--ema was 0.0, now 0.5" in (folder / "run.log").read_text()
    assert not same(state["ema"], {n: state["state_dict"][n] for n in state["ema"]})


# ---- as it is started in earnest ----


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    root = Path(__file__).parents[1]
    flags = arguments(tmp_path, *REINFORCE, "--backbone", "resnet18", "--max-steps", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, root / "train.py", *flags],
        env={**os.environ, "PYTHONPATH": str(root / "segblocks"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu, 2 processes" in done.stdout
    assert done.stdout.count("best mIoU") == 1
    assert checkpoint(tmp_path / "default")["progress"]["total_steps"] == 1
