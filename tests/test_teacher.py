"""Learning from another network: its loss, its checkpoint, runs with it."""

import math

import pytest
import torch
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
from utils.training.teacher import TEMPERATURE, distillation_loss

pytestmark = pytest.mark.usefixtures("tiny_backbone")
WIDE = (*REINFORCE, "--synthetic-size", "128", "256", "--res", "256", "--crop-res", "128")


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tiny_backbone):  # noqa: F811
    """The checkpoint of a dense training."""
    return str(run(tmp_path_factory.mktemp("dense")) / "checkpoint.pth")


ALL = torch.ones(1, 1, 1, dtype=torch.bool)  # valid


class TestLoss:
    def test_it_is_the_divergence_at_a_temperature(self):
        logits, taught = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64).unbind()
        valid = torch.rand(2, 4, 5) < 0.5
        p, q = ((x / TEMPERATURE).softmax(1) for x in (taught, logits))
        by_hand = TEMPERATURE**2 * (p * (p.log() - q.log())).sum(1)[valid].mean()
        found = distillation_loss(logits, taught, valid)
        assert found.item() == pytest.approx(by_hand.item(), rel=1e-5)

    def test_parts_of_a_batch_add_up(self):
        logits, taught = torch.randn(2, 3, 4, 2, 2).unbind()
        valid = torch.rand(3, 2, 2) < 0.7
        parts = [
            distillation_loss(*(x[part] for x in (logits, taught, valid)), lambda _: valid.sum())
            for part in (slice(0, 1), slice(1, 3))
        ]
        torch.testing.assert_close(sum(parts), distillation_loss(logits, taught, valid))

    def test_what_is_said_of_ignored_pixels_does_not_matter(self):
        logits, taught = torch.randn(2, 1, 3, 2, 2).unbind()
        valid = torch.zeros(1, 8, 8, dtype=torch.bool)
        assert distillation_loss(logits, taught, valid) == 0
        valid[:, :4] = True
        other = taught.clone()
        other[:, :, 1] += torch.randn(3, 2)
        one, two = (distillation_loss(logits, x, valid) for x in (taught, other))
        assert torch.equal(one, two)

    def test_equal_predictions_cost_nothing(self):
        logits = torch.randn(1, 3, 2, 2)
        shifted = logits + 5  # the same probabilities
        assert distillation_loss(logits, shifted, ALL).item() == pytest.approx(0, abs=1e-6)
        assert distillation_loss(logits, -logits, ALL).item() > 0

    def test_the_gradient_of_small_differences_is_that_of_logits(self):
        """As Hinton et al. show in section 2.1: at high temperatures logits are matched."""
        taught = 1e-3 * torch.randn(1, 4, 1, 1)
        logits = (1e-3 * torch.randn(1, 4, 1, 1)).requires_grad_()
        distillation_loss(logits, taught, ALL).backward()
        centred = [x - x.mean(1, keepdim=True) for x in (logits.detach(), taught)]
        expected = (centred[0] - centred[1]) / 4
        torch.testing.assert_close(logits.grad, expected, rtol=1e-2, atol=1e-7)

    def test_a_teacher_of_another_stride(self):
        taught = torch.randn(1, 3, 2, 2)
        larger = torch.nn.functional.interpolate(taught, (4, 4), mode="bilinear")
        assert distillation_loss(larger, taught, ALL).item() == pytest.approx(0, abs=1e-6)

    def test_half_precision(self):
        logits, taught = torch.randn(2, 1, 3, 2, 2).bfloat16().unbind()
        assert distillation_loss(logits, taught, ALL).dtype == torch.float32


class TestRuns:
    @pytest.mark.parametrize(
        "flags",
        [
            (),
            WIDE,
            (*WIDE, "--segblocks-refine-epochs", "1", "--epochs", "2"),
            (*WIDE, "--segblocks-policy", "random"),
            ("--amp", "bf16"),
        ],
        ids=["dense", "blocks", "refined", "random", "bf16"],
    )
    def test_it_changes_what_is_learned(self, tmp_path, dense, flags):
        alone = checkpoint(run(tmp_path / "alone", *flags))
        taught = checkpoint(run(tmp_path / "taught", *flags, "--teacher", dense))
        assert not same(alone["state_dict"], taught["state_dict"])
        assert alone["state_dict"].keys() == taught["state_dict"].keys()
        assert same(alone["rng"], taught["rng"])

    def test_weight_zero_changes_nothing(self, tmp_path, dense):
        """Random numbers are not those of a teacher."""
        alone = checkpoint(run(tmp_path / "alone", *WIDE))
        flags = ("--teacher", dense, "--teacher-weight", "0")
        taught = checkpoint(run(tmp_path / "taught", *WIDE, *flags))
        assert same(alone["state_dict"], taught["state_dict"])

    def test_it_stops_and_goes_on(self, tmp_path, dense):
        flags = (*WIDE, "--teacher", dense, "--epochs", "2")
        whole = checkpoint(run(tmp_path / "whole", *flags))
        run(tmp_path / "parts", *flags, "--max-steps", "2")
        parts = checkpoint(run(tmp_path / "parts", *flags))
        assert same(whole["state_dict"], parts["state_dict"])

    def test_it_runs_at_full_resolution_and_learns_nothing(self, tmp_path, dense):
        trainer = make_trainer(tmp_path, *WIDE, "--teacher", dense)
        teacher, image = trainer.objective.teacher, torch.randn(1, 3, 128, 128)
        expected = make_trainer(tmp_path).model
        train.load_weights(expected, dense)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        trainer.train_on(next(iter(trainer.train_loader)), 2)
        assert same(before, dict(teacher.state_dict()))
        assert not any(p.requires_grad for p in teacher.parameters())
        with torch.no_grad():
            torch.testing.assert_close(teacher(image), expected.eval()(image).logits)

    def test_a_teacher_may_have_had_a_policy_and_another_width(self, tmp_path):
        flags = ("--num-features", "16", *REINFORCE)
        teacher = run(tmp_path / "teacher", *flags, "--max-steps", "1") / "checkpoint.pth"
        run(tmp_path / "taught", "--max-steps", "1", "--teacher", str(teacher))


class TestErrors:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--teacher-weight", "0.3"), "--teacher-weight needs --teacher FILE"),
            (("--teacher", "x", "--mode", "val"), "--teacher is for --mode train"),
            (("--teacher", "x", "--teacher-weight", "1.5"), "out of range"),
        ],
    )
    def test_flags(self, tmp_path, capsys, flags, message):
        with pytest.raises(SystemExit):
            parse_args(arguments(tmp_path, *flags))
        assert message in capsys.readouterr().err

    def test_files(self, tmp_path, capsys, dense):
        state = torch.load(dense, weights_only=True)
        names = [n for n in state["state_dict"] if n.startswith("net.logits")]
        for name in names:  # of two classes more
            value = state["state_dict"][name]
            if value.shape[:1] == (19,):
                state["state_dict"][name] = torch.cat((value, value[:2]))
        torch.save(state, tmp_path / "other.pth")
        for file, message in (("none.pth", "none.pth"), ("other.pth", "--teacher")):
            assert train.main(arguments(tmp_path, "--teacher", str(tmp_path / file))) == 1
            line = capsys.readouterr().err.strip().splitlines()[-1]
            assert line.startswith("error: ")
            assert message in line

    def test_weight_has_a_default(self, tmp_path):
        args = parse_args(arguments(tmp_path, "--teacher", "x"))
        assert math.isclose(args.teacher_weight, 0.5)
