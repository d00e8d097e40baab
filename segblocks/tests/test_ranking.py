"""A policy that learns from what was measured does what REINFORCE does on average."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from segblocks import build_policy
from segblocks.policy.ranking import BUDGETS, ranking_loss
from segblocks.policy.reinforce import BEFORE_WEIGHT
from segblocks.policy.sampling import shift_to_count

SHARES = [(i + 0.5) / BUDGETS for i in range(BUDGETS)]


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_shift_for_each_image_is_that_of_the_image_alone():
    logits, counts = 3 * values(4, 3, 5), [0.0, 2.5, 7.0, 15.0]
    found = shift_to_count(logits, torch.tensor(counts))
    for i, count in enumerate(counts):
        alone = shift_to_count(logits[i : i + 1], count)
        assert torch.allclose(found[i : i + 1], alone, atol=1e-4)


def test_the_gradient_is_the_mean_of_that_of_reinforce():
    """Over all grids of three blocks, weighed by how probable they are."""
    logits, saving = values(2, 1, 3).requires_grad_(), values(2, 1, 3, seed=1)
    (found,) = torch.autograd.grad(ranking_loss(logits, saving), logits)
    expected = torch.zeros_like(logits)
    for share in SHARES:
        shifted = logits - shift_to_count(logits, 3 * share)
        for actions in product([False, True], repeat=3):
            grid = torch.tensor(actions).expand(2, 1, 3)
            log_prob = F.logsigmoid(torch.where(grid, shifted, -shifted))
            probable = log_prob.detach().sum((1, 2), keepdim=True).exp()
            merit = log_prob * torch.where(grid, saving, -saving)
            (one,) = torch.autograd.grad(-(probable * merit).sum(), logits)
            expected += one / (logits.numel() * BUDGETS)
    assert torch.allclose(found, expected, atol=1e-6)


def test_only_the_order_counts():
    logits, saving = values(2, 3, 4), values(2, 3, 4, seed=1)
    moved = ranking_loss(logits + 5, saving, 0.5)
    assert torch.allclose(moved, ranking_loss(logits, saving, 0.5), atol=1e-5)


def test_entropy_keeps_probabilities_at_each_share():
    flat, saving = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    assert float(ranking_loss(flat, saving, 1.0)) == pytest.approx(0, abs=1e-5)
    assert float(ranking_loss(values(1, 2, 4), saving, 1.0)) > 0.05
    assert float(ranking_loss(values(1, 2, 4), saving, 0.0)) == 0


def test_blocks_come_to_be_ranked_by_their_saving():
    saving = values(3, 3, 4, seed=2)
    logits = torch.zeros(3, 3, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        ranking_loss(logits, saving, 0.5).backward()
        optimizer.step()
    assert torch.equal(logits.flatten(1).argsort(1), saving.flatten(1).argsort(1))


@pytest.mark.parametrize("budgets", [None, (0.25, 0.25)])
def test_a_policy_learns_from_savings_of_any_scale(budgets):
    torch.manual_seed(0)
    policy = build_policy("reinforce", 32, budgets=budgets, entropy_weight=0.5)
    image, saving = values(2, 3, 96, 128), values(2, 3, 4, seed=1)
    gradients = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(1)
        result = policy(image)
        decided = SimpleResult(result)
        loss, stats = policy.refining_loss(decided, scale * saving + 7)
        gradients.append(torch.autograd.grad(loss, result.scores)[0])
        assert stats["share"] == result.grid.float().mean()
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert gradients[0].any()


def test_what_a_policy_said_before_counts_too():
    torch.manual_seed(0)
    policy = build_policy("reinforce", 32)
    result = SimpleResult(policy(values(2, 3, 96, 128)))
    saving, before = values(2, 3, 4, seed=1), values(2, 3, 4, seed=2)

    def gradient(*given):
        loss, _ = policy.refining_loss(result, *given)
        return torch.autograd.grad(loss, result.scores, retain_graph=True)[0]

    both = (saving - saving.mean()) / saving.std(correction=0)
    both = both + BEFORE_WEIGHT * (before - before.mean()) / before.std(correction=0)
    assert torch.allclose(gradient(saving, 9 * before - 4), gradient(both), atol=1e-6)
    assert not torch.allclose(gradient(saving, before), gradient(saving), atol=1e-4)


class SimpleResult:
    """A decision with its share, as SegBlocksModel returns it."""

    def __init__(self, decision):
        self.scores, self.share = decision.scores, decision.grid.float().mean()
