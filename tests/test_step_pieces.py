"""A step in two pieces is the step in one."""

import pytest
import torch
from tiny import REINFORCE, make_trainer, same, tiny_backbone  # noqa: F401

from dataloaders import to_network
from utils.training.step_pieces import StepPieces

pytestmark = pytest.mark.usefixtures("tiny_backbone")
# Two images of four blocks.
SHORT = "--synthetic-size 128 256 --res 256 --crop-res 128".split()


def pieces_of(trainer) -> StepPieces:
    take = trainer._take_step
    does = (take._inputs_of, trainer.objective.decide, take._loss_of, take._update)
    return StepPieces(trainer.model, trainer.run.optimizer, *does)


def trained(tmp_path, flags, step, steps=3):
    """Weights, moments, what was logged and the state of the generator after some steps."""
    trainer = make_trainer(tmp_path, *SHORT, *flags)
    pieces, logged = pieces_of(trainer), []
    batches = list(trainer.train_loader)
    trainer.progress.epoch = trainer.args.epochs - 1
    for i in range(steps):
        image, label, _, *changes = batches[i % len(batches)]
        # As WholeSteps does it, the first of a kind is in one.
        take = step if i else one
        loss, told = take(pieces, (image, label, *changes))
        logged.append((loss, told))
    state = (trainer.model.state_dict(), trainer.run.optimizer.state_dict()["state"])
    trainer.close()
    return *state, logged, torch.get_rng_state()


def one(pieces, batch):
    return pieces.whole(batch, None)


def in_two(pieces, batch):
    begun, policy = pieces.begin(batch), pieces.model.policy
    assert begun.decision.n_high is None
    assert int(begun.count) == int(begun.decision.sampled.sum())
    n_high = policy.rounded_up(int(begun.count), begun.decision.sampled.numel())
    return pieces.finish(begun, n_high)


@pytest.mark.parametrize(
    "flags",
    [
        REINFORCE,
        (*REINFORCE, "--segblocks-quantize-percentage", "0.5"),
        (*REINFORCE, "--segblocks-recolour", "yes", "--segblocks-reward", "balanced"),
        (*REINFORCE, "--segblocks-normalise-advantage", "yes", "--segblocks-entropy-weight", "1"),
        (*REINFORCE, "--epochs", "2", "--segblocks-refine-epochs", "1"),
        (*REINFORCE, "--segblocks-policy-epochs", "0"),
        (*REINFORCE, "--amp", "bf16"),
        (*REINFORCE, "--segblocks-policy", "heuristic"),
    ],
    ids=" ".join,
)
def test_two_pieces_are_one(tmp_path, flags):
    whole = trained(tmp_path, flags, one)
    assert same(trained(tmp_path, flags, in_two), whole)


def test_a_piece_is_finished_again_when_weights_have_changed(tmp_path):
    """As captures do it, one for each number of blocks; graphs compute the first piece anew."""
    trainer = make_trainer(tmp_path, *SHORT, *REINFORCE, "--grad-clip", "1")
    pieces = pieces_of(trainer)
    image, label, _, *changes = next(iter(trainer.train_loader))
    begun = pieces.begin((image, label, *changes))
    before = [p.detach().clone() for p in pieces.parameters]
    for n_high in (int(begun.count), 8):
        loss, logged = pieces.finish(begun, n_high)
        assert loss.isfinite()
        assert [names for names, _ in logged][-1] == ("gradient_norm",)
        changed = [not torch.equal(p, b) for p, b in zip(pieces.parameters, before)]
        assert all(changed)
        assert all(p.grad is None for p in pieces.parameters)
    trainer.close()


@pytest.mark.parametrize("settled", [False, True])
def test_a_model_acts_on_what_was_decided(tmp_path, settled):
    trainer = make_trainer(tmp_path, *SHORT, *REINFORCE)
    model, (image, label, _, *changes) = trainer.model, next(iter(trainer.train_loader))
    image, _ = to_network(image, label, *changes)
    model.train()
    with torch.no_grad():
        decision = model.decide(image)
        if settled:
            decision = model.policy.settle(decision)
        rng = torch.get_rng_state()
        found = model(image, decision=decision)
    assert torch.equal(found.sampled, decision.sampled)
    assert torch.equal(found.scores, decision.scores)
    assert found.n_high == int(found.grid.sum()) == model.policy.settle(decision).n_high
    assert torch.equal(rng, torch.get_rng_state())  # nothing was drawn again
    trainer.close()
