"""Losses and weights that are not finite."""

import pytest
import torch
from tiny import DEVICES, REINFORCE, arguments, make_trainer, run, tiny_backbone  # noqa: F401

import train
from utils.errors import UserError
from utils.training.guard import FiniteGuard
from utils.training.objective import Objective

pytestmark = pytest.mark.usefixtures("tiny_backbone")


def test_loss_that_is_not_finite_stops_and_names_step_and_images(tmp_path, capsys, monkeypatch):
    folder = run(tmp_path, "--max-steps", "1")
    good = (folder / "checkpoint.pth").read_bytes()
    monkeypatch.setattr(
        Objective, "__call__", lambda self, *_: (_nan(self.model), ("loss",), torch.zeros(1))
    )
    assert train.main(arguments(tmp_path, "--max-steps", "3")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: the loss is nan at step 2 (images: synthetic/train/00000")
    assert (folder / "checkpoint.pth").read_bytes() == good


def _nan(model):
    return sum(p.sum() for p in model.parameters()) * torch.nan


def test_finite_guard_names_the_first_bad_step():
    class Names:
        def name_of(self, index):
            return f"image{index}"

    guard = FiniteGuard(Names())
    for step, loss in enumerate([1.0, 2.0, float("inf"), float("nan")]):
        guard.add(torch.tensor(loss), torch.tensor([step]), step)
    answer = guard.ask()
    guard.add(torch.tensor(0.0), torch.tensor([4]), 4)
    with pytest.raises(UserError, match=r"inf at step 3 \(images: image2\)"):
        answer()
    guard.ask()()  # of what has been added since
    guard.add(torch.tensor(float("nan")), torch.tensor([5]), 5)
    with pytest.raises(UserError, match=r"nan at step 6 \(images: image5\)"):
        guard.ask()()


@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_named_as_they_were_when_asked(device):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2))
    net, guard = net.to(device), FiniteGuard(None)
    guard.ask(net)()
    with torch.no_grad():
        net[0].weight.fill_(1e30)  # large, but a number
        guard.ask(net)()
        net[0].bias[0] = torch.nan
        answer = guard.ask(net)
        net[2].weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"^1 weights are not finite .* \(0\.bias\), though"):
        answer()
