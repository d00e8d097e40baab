"""What a pixel earns the policy, against its definition."""

import pytest
import torch
from torch import Tensor

from argparser import parse_args
from dataloaders.info import CAMVID
from utils.training.reward import BalancedReward, LossReward, build_reward

IGNORED = 255
WIDTHS = (4, 8, 20, 32)  # of columns of one class each, wider than what sizes are sampled at


def batch(images: int = 2) -> tuple[Tensor, Tensor]:
    """-> losses and labels."""
    label = torch.repeat_interleave(torch.arange(4), torch.tensor(WIDTHS))
    label = label.expand(images, 8, sum(WIDTHS)).clone()
    label[0, 4:, 32:] = IGNORED
    losses = torch.rand(label.shape, generator=torch.Generator().manual_seed(0)) + 0.1
    return losses * (label != IGNORED), label


def ratio(weights: Tensor, label: Tensor, one: int, other: int) -> float:
    return float(weights[label == one][0] / weights[label == other][0])


def test_balanced_is_the_loss_over_the_size_of_the_class():
    losses, label = batch()
    reward = BalancedReward(5, IGNORED)(losses, label)
    assert (reward[label == IGNORED] == 0).all()
    valid = label != IGNORED
    sizes = torch.bincount(label[valid])
    expected = losses[valid] / sizes[label[valid]]
    scale = sizes.sum() / (1 / sizes[label[valid]]).sum()  # the mean weight is 1
    torch.testing.assert_close(reward[valid], expected * scale)


def test_sizes_are_those_of_all_batches():
    losses, label = batch()
    reward = BalancedReward(5, IGNORED)
    for _ in range(3):
        reward(losses, label.where(label != 0, 1))
    weights = reward(losses, label) / losses
    # Class 0 was seen in one batch of four; class 1 took its place in the others.
    assert ratio(weights, label, 0, 1) == pytest.approx((4 * 8 + 3 * 4) / 4)


def test_a_class_hardly_ever_seen_does_not_drown_the_others():
    losses, label = batch()
    reward = BalancedReward(5, IGNORED)
    for _ in range(1000):
        reward(losses, torch.full_like(label, 3))
    assert 900 < ratio(reward(losses, label) / losses, label, 0, 3) < 1001


def test_nothing_valid_earns_nothing():
    _, label = batch()
    reward = BalancedReward(5, IGNORED)(torch.zeros(label.shape), torch.full_like(label, IGNORED))
    assert (reward == 0).all()


def test_of_two_processes_as_of_one():
    """What both have seen, and the weights of both, decide what a pixel of either earns."""
    losses, label = batch(4)
    whole = BalancedReward(5, IGNORED)
    expected = whole(losses, label)
    valid = label[label != IGNORED]
    weights = (whole.seen.sum() / whole.seen)[valid]
    sums = [whole.seen, torch.stack([torch.tensor(float(len(valid))), weights.sum()])]
    found = []
    for part in (slice(0, 2), slice(2, 4)):
        answers = iter(sums)
        reward = BalancedReward(5, IGNORED, lambda _, answers=answers: next(answers))
        found.append(reward(losses[part], label[part]))
    torch.testing.assert_close(torch.cat(found), expected)


def test_the_loss_is_taken_as_it_is():
    losses, label = batch()
    assert LossReward()(losses, label) is losses


@pytest.mark.parametrize(("name", "kind"), [("loss", LossReward), ("balanced", BalancedReward)])
def test_chosen_by_flag(name, kind):
    flags = ["--dataset", "synthetic", "--segblocks-policy", "reinforce"]
    assert type(build_reward(parse_args([*flags, "--segblocks-reward", name]), CAMVID)) is kind
