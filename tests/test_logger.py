"""run.log and TensorBoard: what they hold."""

import io
import time

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import REINFORCE, arguments, run, tiny_backbone  # noqa: F401
from torchvision.transforms.v2.functional import pil_to_tensor

from utils.logger import Means, RunLog
from utils.training.objective import Objective

pytestmark = pytest.mark.usefixtures("tiny_backbone")


def test_tensorboard_and_log_hold_what_they_should(tmp_path):
    folder = run(tmp_path, *REINFORCE, "--max-steps", "2", "--log-every", "1")
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    expected = {
        *(f"train/loss_{kind}" for kind in ("task", "policy", "total")),
        *(f"train/{name}" for name in ("share", "sparsity_reward", "advantage")),
        *(f"train/{name}" for name in ("task_advantage", "prob_mean", "prob_std")),
        *(f"lr/{group}" for group in ("decoder", "backbone", "policy")),
        *(f"val/{name}" for name in ("miou", "overall_accuracy", "mean_accuracy")),
        *(f"val/{name}" for name in ("weighted_accuracy", "share", "gmacs")),
        "val_iou/road",
        "val_gmacs/net.backbone",
    }
    assert expected <= set(tags["scalars"])
    assert tags["images"] == ["val/0", "val/1"]
    assert [e.step for e in events.Scalars("train/loss_total")] == [1, 2]
    total, task, policy = (
        events.Scalars(f"train/loss_{kind}")[0].value for kind in ("total", "task", "policy")
    )
    assert total == pytest.approx(task + policy, abs=1e-6)
    log = (folder / "run.log").read_text()
    assert "command: " in log
    assert "mIoU" in log


def test_a_picture_in_tensorboard_is_the_one_that_was_given(tmp_path):
    picture = torch.linspace(0, 255, 30 * 50).to(torch.uint8).view(30, 50)
    picture = torch.stack([picture, picture.flip(0), picture.flip(1)])
    with RunLog(tmp_path, tensorboard=True) as log:
        log.picture(7, "val/0", picture)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (found,) = events.Images("val/0")
    assert (found.step, found.width, found.height) == (7, 50, 30)
    shown = Image.open(io.BytesIO(found.encoded_image_string))
    assert (pil_to_tensor(shown).int() - picture.int()).abs().float().mean() < 3  # of 255: a JPEG


def test_means_are_of_what_was_added_since_the_last_time():
    means = Means()
    for value in (1.0, 2.0, 6.0):
        means.add(("a",), torch.tensor([value]))
    means.add(("b",), torch.tensor([5.0]))
    assert means.ask()() == {"a": 3.0, "b": 5.0}
    means.add(("a",), torch.tensor([1.0]))
    assert means.ask(lambda x: 2 * x)() == {"a": 2.0}
    assert means.ask()() == {}
    means.add(("a",), torch.tensor([1.0]))
    asked = means.ask()
    means.add(("a",), torch.tensor([2.0]))
    assert asked() == {"a": 1.0}
    assert means.ask()() == {"a": 2.0}


def test_images_per_second_are_those_of_the_steps(tmp_path, monkeypatch):
    """What follows an epoch belongs to the next line, and so do its images."""
    passed = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: passed[0])
    loss_of = Objective.__call__

    def takes_a_second(self, *given):
        passed[0] += 1
        return loss_of(self, *given)

    monkeypatch.setattr(Objective, "__call__", takes_a_second)
    folder = run(tmp_path, "--epochs", "3", "--val-every", "0", "--log-every", "1")
    lines = [x for x in (folder / "run.log").read_text().splitlines() if "img/s" in x]
    assert len(lines) == 9
    assert all(x.endswith("; 2.0 img/s") for x in lines)
