"""What a run that stops, fails or is taken up elsewhere saves, keeps and says."""

import errno
import itertools
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from test_stop_and_go import SETTING
from tiny import arguments, checkpoint, make_trainer, run, tiny_backbone  # noqa: F401

import train
from utils.errors import UserError
from utils.logger import RunLog
from utils.ranks import Agreement, Ranks
from utils.training import trainer, validations, writer
from utils.training.optim import restore
from utils.training.signals import stop_requests

pytestmark = pytest.mark.usefixtures("tiny_backbone")


def test_sigterm_twice_still_saves_and_ctrl_c_twice_does_not_wait():
    with stop_requests() as request:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("limit", [0, 1e9])
def test_validation_that_fails_loses_little(tmp_path, monkeypatch, limit):
    """What is much is saved before; then the same command begins with the validation."""
    monkeypatch.setattr(trainer, "UNSAVED_SECONDS", limit)
    evaluate, folder, steps = validations.evaluate, tmp_path / "default", []

    def fail(*args, **options):
        raise UserError("no such label")

    def note(*args, **options):
        steps.append(checkpoint(folder)["progress"]["total_steps"])
        return evaluate(*args, **options)

    monkeypatch.setattr(validations, "evaluate", fail)
    assert train.main(arguments(tmp_path, *SETTING)) == 1
    assert (folder / "checkpoint.pth").exists() == (limit == 0)
    if limit:
        return
    at = checkpoint(folder)["progress"]
    assert (at["epoch"], at["step"]) == (0, 3)
    monkeypatch.setattr(validations, "evaluate", note)
    run(tmp_path, *SETTING)
    assert steps == [3, 6, 9]


@pytest.mark.parametrize(
    ("flags", "told"),
    [((), "the same command"), (("--resume-best", "yes"), "--resume auto")],
)
def test_what_goes_on_from_there(tmp_path, capsys, monkeypatch, flags, told):
    folder = run(tmp_path, *SETTING, "--max-steps", "3")
    assert (folder / "checkpoint_best.pth").exists()

    def stop(self, log):
        raise train.Stopped(signal.SIGTERM)

    monkeypatch.setattr(train.Trainer, "fit", stop)
    assert train.main(arguments(tmp_path, *SETTING, *flags)) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.strip().endswith(f"{told} goes on from there")


def test_a_run_of_the_cpu_may_go_on_where_steps_are_counted_on_the_device():
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {"optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": 0}}
    for state in saved["optimizer"]["state"].values():
        state["step"] = state["step"].double()
    other = torch.optim.Adam(net.parameters())
    other.param_groups[0]["capturable"] = True
    restore(other, SimpleNamespace(go_to=lambda epoch: None), saved)
    for p in net.parameters():
        assert other.state[p]["step"].dtype == torch.float32
        assert other.state[p]["step"].device == p.device


def test_what_ranks_agreed_on_is_forgotten_once_it_is_done():
    agreement, waited = Agreement(Ranks(count=2)), []
    agreement._under_way = torch.tensor(1), SimpleNamespace(wait=lambda: waited.append(1))
    agreement.forget()
    agreement.forget()
    assert waited == [1]
    assert agreement._under_way is None


def test_the_best_of_another_experiment_is_not_ours(tmp_path):
    folder = run(tmp_path, *SETTING, "--max-steps", "4")
    state = checkpoint(folder)
    state["progress"]["score_best"] = 0.9
    torch.save(state, tmp_path / "other.pth")
    for place, best in ((tmp_path / "other.pth", -1.0), (folder / "copy.pth", 0.9)):
        torch.save(state, place)
        trainer = make_trainer(tmp_path, *SETTING)
        trainer.load(place)
        assert trainer.progress.score_best == best
        assert trainer.progress.total_steps == 4


def test_no_room_for_tensorboard_ends_its_files_alone(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("utils.logger.SummaryWriter.add_scalar", full)
    monkeypatch.setattr("utils.logger.SummaryWriter.close", full)
    folder = run(tmp_path, *SETTING)
    log = (folder / "run.log").read_text()
    assert log.count("warning: TensorBoard files end here: [Errno 28] No space left") == 1
    assert checkpoint(folder)["progress"]["total_steps"] == 9
    with RunLog(tmp_path / "run") as log:
        monkeypatch.setattr("utils.logger.os.replace", full)
        with pytest.raises(UserError, match="No space left"):
            log.json("val.json", {})


def fail_at(monkeypatch, *numbers):
    """No room for checkpoints of these numbers, counted from 1."""
    save, count = writer.save_checkpoint, itertools.count(1)

    def save_or_not(*given):
        if next(count) in numbers:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*given)

    monkeypatch.setattr(writer, "save_checkpoint", save_or_not)


def test_a_disk_that_was_full_for_a_moment_is_reported(tmp_path, monkeypatch):
    fail_at(monkeypatch, 2)
    folder = run(tmp_path, *SETTING, "--val-every", "0")
    assert checkpoint(folder)["progress"]["total_steps"] == 9
    log = (folder / "run.log").read_text()
    assert (
        log.count("WARNING warning: [Errno 28] No space left on device; the checkpoint after") == 1
    )


def test_a_full_disk_is_reported_beside_what_ends_training(tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, 1)
    step = trainer.Trainer._step

    def step_or_fail(self, means):
        if self.progress.total_steps == 3:
            raise UserError("no such label")
        step(self, means)

    monkeypatch.setattr(trainer.Trainer, "_step", step_or_fail)
    assert train.main(arguments(tmp_path, *SETTING, "--val-every", "0")) == 1
    assert "no such label" in capsys.readouterr().err
    log = (tmp_path / "default" / "run.log").read_text()
    assert "the last checkpoint could not be written: [Errno 28] No space left" in log


def test_a_disk_that_stays_full_ends_training(tmp_path, monkeypatch, capsys):
    fail_at(monkeypatch, 2, 3)
    assert train.main(arguments(tmp_path, *SETTING, "--val-every", "0")) == 1
    assert "No space left on device; the checkpoints before it" in capsys.readouterr().err
    assert checkpoint(tmp_path / "default")["progress"]["total_steps"] == 3


def test_moments_lie_in_memory_as_their_parameters_do():
    net = torch.nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    one, other = (torch.optim.Adam(net.parameters()) for _ in range(2))
    net(torch.randn(1, 2, 5, 5)).sum().backward()
    one.step()
    saved = one.state_dict()
    for moments in saved["state"].values():
        for name, value in moments.items():
            moments[name] = value.contiguous().clone(memory_format=torch.contiguous_format)
    saved = {"optimizer": saved, "scheduler": {"last_epoch": 0}}
    restore(other, SimpleNamespace(go_to=lambda epoch: None), saved)
    for p in net.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert other.state[p][name].stride() == p.stride()
            assert torch.equal(other.state[p][name], one.state[p][name])


@pytest.mark.parametrize("fails", [False, True], ids=["trained", "failed"])
def test_data_workers_end_with_training(tmp_path, monkeypatch, fails):
    """Not with the loaders, which live on here, nor with Python, which would wait for each."""
    flags = [*SETTING, "--num-workers", "2", "--epochs", "1"]
    one = make_trainer(tmp_path, *flags)
    if fails:
        monkeypatch.setattr(one, "validations", None)
    with RunLog(tmp_path / "default") as log:
        if fails:
            with pytest.raises(TypeError):
                one.fit(log)
        else:
            one.fit(log)
    assert one.train_loader.num_workers > 0
    assert not multiprocessing.active_children()
    assert len(next(iter(one.val_loader))) == 3, "another pass starts others"


def test_another_policy_says_which_flags_to_give(tmp_path, capsys):
    run(tmp_path, *SETTING, "--max-steps", "1")
    argv = arguments(tmp_path, *SETTING, "--segblocks-policy", "random", "--max-steps", "2")
    assert train.main(argv) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--segblocks-policy" in line
