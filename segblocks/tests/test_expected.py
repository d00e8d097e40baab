"""A policy that learns from what was measured does what REINFORCE does on average."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from segblocks import SegBlocksOutput, build_policy
from segblocks.policy.expected import BUDGETS, expected_policy_loss
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


def test_the_loss_is_what_grids_are_expected_to_lose():
    """Over all grids of three blocks, weighed by how probable they are."""
    logits, gain = values(2, 1, 3), values(2, 1, 3, seed=1)
    expected = 0.0
    for share in SHARES:
        shifted = logits - shift_to_count(logits, min(max(3 * share, 0.5), 2.5))
        for actions in product([False, True], repeat=3):
            grid = torch.tensor(actions).expand(2, 1, 3)
            probable = F.logsigmoid(torch.where(grid, shifted, -shifted)).sum((1, 2)).exp()
            lost = -torch.where(grid, gain, -gain).sum((1, 2))
            expected += float((probable * lost).sum()) / (logits.numel() * BUDGETS)
    assert float(expected_policy_loss(logits, gain)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.5])
def test_the_gradient_is_that_of_the_loss(entropy_weight):
    logits, gain = values(2, 2, 3).double().requires_grad_(), values(2, 2, 3, seed=1).double()
    (found,) = torch.autograd.grad(expected_policy_loss(logits, gain, entropy_weight), logits)
    numeric, step = torch.zeros_like(found), 1e-2
    with torch.no_grad():
        for i in range(logits.numel()):
            unit = torch.zeros(logits.numel(), dtype=torch.double).index_fill(0, torch.tensor(i), 1)
            unit = step * unit.view_as(logits)
            up, down = (
                expected_policy_loss(logits + sign * unit, gain, entropy_weight) for sign in (1, -1)
            )
            numeric.view(-1)[i] = (up - down) / (2 * step)
    assert torch.allclose(found, numeric, atol=2e-4)
    assert found.sum((1, 2)).abs().max() < 1e-6  # the level of an image earns nothing


def test_with_entropy_logits_settle():
    gain = values(4, 3, 4, seed=3)
    logits = torch.zeros(4, 3, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    spread = []
    for step in range(1200):
        optimizer.zero_grad()
        expected_policy_loss(logits, gain, 0.5).backward()
        optimizer.step()
        if step % 400 == 399:
            spread.append(float(logits.detach().std()))
    assert spread[2] == pytest.approx(spread[1], rel=0.05)
    assert spread[2] < 6


@pytest.mark.parametrize("blocks", [(1, 1), (1, 2), (2, 2)])
def test_images_of_few_blocks(blocks):
    flat = torch.zeros(1, *blocks, requires_grad=True)
    loss = expected_policy_loss(flat, torch.zeros(1, *blocks), 1.0)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    loss.backward()
    assert flat.grad.isfinite().all()


def test_only_the_order_counts():
    logits, gain = values(2, 3, 4), values(2, 3, 4, seed=1)
    moved = expected_policy_loss(logits + 5, gain, 0.5)
    assert torch.allclose(moved, expected_policy_loss(logits, gain, 0.5), atol=1e-5)


def test_entropy_keeps_probabilities_at_each_share():
    flat, gain = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    assert float(expected_policy_loss(flat, gain, 1.0)) == pytest.approx(0, abs=1e-5)
    assert float(expected_policy_loss(values(1, 2, 4), gain, 1.0)) > 0.05
    assert float(expected_policy_loss(values(1, 2, 4), gain, 0.0)) == 0


def test_blocks_come_to_be_ranked_by_their_gain():
    gain = values(3, 3, 4, seed=2)
    logits = torch.zeros(3, 3, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        expected_policy_loss(logits, gain, 0.5).backward()
        optimizer.step()
    assert torch.equal(logits.flatten(1).argsort(1), gain.flatten(1).argsort(1))


@pytest.mark.parametrize("budgets", [None, (0.25, 0.25)])
def test_a_policy_learns_from_gains_of_any_scale(budgets):
    torch.manual_seed(0)
    policy = build_policy("reinforce", 32, budgets=budgets, entropy_weight=0.5)
    image, gain = values(2, 3, 96, 128), values(2, 3, 4, seed=1)
    gradients = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(1)
        result = SegBlocksOutput(**vars(policy(image)))
        loss, stats = policy.refining_loss(result, scale * gain + 7)
        gradients.append(torch.autograd.grad(loss, result.scores)[0])
        assert stats["share"] == result.grid.float().mean()
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert gradients[0].any()


def test_what_a_policy_said_before_counts_too():
    torch.manual_seed(0)
    policy = build_policy("reinforce", 32)
    result = SegBlocksOutput(**vars(policy(values(2, 3, 96, 128))))
    gain, before = values(2, 3, 4, seed=1), values(2, 3, 4, seed=2)

    def gradient(*given):
        loss, _ = policy.refining_loss(result, *given)
        return torch.autograd.grad(loss, result.scores, retain_graph=True)[0]

    both = (gain - gain.mean()) / gain.std(correction=0)
    both = both + BEFORE_WEIGHT * (before - before.mean()) / before.std(correction=0)
    assert torch.allclose(gradient(gain, 9 * before - 4), gradient(both), atol=1e-6)
    assert not torch.allclose(gradient(gain, before), gradient(gain), atol=1e-4)
