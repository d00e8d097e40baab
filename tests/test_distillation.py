"""Training towards the network's own predictions at full resolution."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import (  # noqa: F401
    REINFORCE,
    checkpoint,
    make_trainer,
    run,
    same,
    tiny_backbone,
)

from dataloaders import to_network
from utils.losses import distillation_loss

pytestmark = pytest.mark.usefixtures("tiny_backbone")

FLAGS = (*REINFORCE, "--segblocks-distil", "0.25", "--segblocks-percent-target", "0.5")


def test_divergence_of_classes():
    torch.manual_seed(0)
    own, teacher = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    own.requires_grad_()
    found = distillation_loss(own, teacher)
    p, q = teacher.softmax(1), own.softmax(1)
    expected = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(found.double(), expected)
    (gradient,) = torch.autograd.grad(found, own)
    torch.testing.assert_close(gradient, (q - p) / 24, atol=1e-6, rtol=1e-4)
    assert distillation_loss(teacher, teacher) == 0
    assert distillation_loss(own.half(), teacher.half()).dtype == torch.float32


def first_batch(trainer):
    trainer.train_loader.sampler.set_epoch(0, 0, 1)
    return next(iter(trainer.train_loader))


def test_full_resolution_is_that_of_evaluation_and_leaves_no_trace(tmp_path):
    trainer = make_trainer(tmp_path, *FLAGS)
    model, image = trainer.model.train(), to_network(*first_batch(trainer)[:2])[0]
    before = {n: v.clone() for n, v in model.state_dict().items()}
    found = model.at_full_resolution(image[..., :100])
    assert all(module.training for module in model.modules())
    assert same(before, dict(model.state_dict()))
    assert not found.requires_grad
    with torch.no_grad():
        expected = model.eval()(image[..., :100], budget=1.0).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_loss_is_part_labels_part_full_resolution(tmp_path):
    trainer = make_trainer(tmp_path, *FLAGS)
    image, label = to_network(*first_batch(trainer)[:2])
    same_model = copy.deepcopy(trainer.model.train())
    torch.manual_seed(0)
    total, names, values = trainer._loss(image, label)
    named = dict(zip(names, values.tolist()))
    learned = 0.75 * named["loss_task"] + 0.25 * named["loss_distil"]
    assert named["loss_distil"] > 0
    assert named["loss_total"] == pytest.approx(learned + named["loss_policy"], rel=1e-4)
    assert total.item() == pytest.approx(named["loss_total"], rel=1e-5)
    torch.manual_seed(0)
    result = same_model(image)
    teacher = same_model.at_full_resolution(image)
    own, wanted = result.logits.log_softmax(1), teacher.softmax(1)
    expected = F.kl_div(own, wanted, reduction="none").sum(1).mean()
    assert named["loss_distil"] == pytest.approx(expected.item(), rel=1e-4)


def test_it_changes_what_is_learned_and_stops_and_goes_on(tmp_path):
    short = ("--epochs", "2", "--val-every", "0")
    whole, plain = (
        checkpoint(run(tmp_path / name, *short, *FLAGS, *more))
        for name, more in (("whole", ()), ("plain", ("--segblocks-distil", "0")))
    )
    assert not same(whole["state_dict"], plain["state_dict"])
    run(tmp_path / "parts", *short, *FLAGS, "--max-steps", "2")
    parts = checkpoint(run(tmp_path / "parts", *short, *FLAGS))
    for entry in ("state_dict", "optimizer", "rng"):
        assert same(whole[entry], parts[entry]), entry
