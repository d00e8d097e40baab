"""Budgets imposed in training, warm-up on random grids, rewards, and the fitted threshold."""

import pytest
import torch
from torch import nn

import segblocks
from segblocks import SegBlocksModel, build_policy
from segblocks.policy import Decision
from segblocks.policy.entropy import divergence_from_share, entropy
from segblocks.policy.sampling import sample_count, shift_to_count
from segblocks.policy.threshold import fit_threshold

BLOCK = 16


def images(n=2, gh=3, gw=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, gh * BLOCK, gw * BLOCK, generator=generator)


def spread(values):
    """(N, Gh, Gw) block values to pixels."""
    return values.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)


# ---- exactly k blocks ----


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_shifted_probabilities_add_up_to_the_count(count, scale):
    logits = scale * torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(1)) + 2
    shift = shift_to_count(logits, count)
    total = (logits - shift).sigmoid().sum((1, 2))
    expected = min(max(count, 0.5), 11.5)
    assert torch.allclose(total, torch.full((3,), float(expected)), atol=1e-3)


def test_samples_have_the_count_and_follow_the_probabilities():
    logits = torch.tensor([[[-3.0, -1.0, 0.0], [0.5, 1.0, 3.0]]])
    shifted = logits - shift_to_count(logits, 3)
    drawn = torch.stack([sample_count(shifted, 3, torch.rand_like(shifted)) for _ in range(4000)])
    assert (drawn.sum((1, 2, 3)) == 3).all()
    frequency = drawn.double().mean((0, 1))
    assert torch.allclose(frequency, shifted[0].double().sigmoid(), atol=0.06)


@pytest.mark.parametrize("name", ["reinforce", "random", "middle", "heuristic"])
def test_every_policy_trains_within_its_budgets(name):
    policy = build_policy(name, BLOCK, budgets=(0.25, 0.75), quantize_percentage=1 / 12)
    shares = set()
    for _ in range(40):
        grid = policy(images()).grid
        counts = grid.sum((1, 2))
        assert (counts == counts[0]).all()  # one budget for the batch
        shares.add(int(counts[0]))
    assert shares <= set(range(3, 10))
    assert len(shares) > 3
    assert {3, 9} & shares or {4, 8} <= shares
    policy.eval()
    own = build_policy(name, BLOCK, quantize_percentage=1 / 12).eval()
    own.load_state_dict(policy.state_dict())
    torch.manual_seed(0)
    evaluated = policy(images()).grid
    torch.manual_seed(0)
    assert torch.equal(evaluated, own(images()).grid)  # evaluation takes no notice


def test_budgets_have_few_distinct_counts():
    policy = build_policy("reinforce", BLOCK, budgets=(0.0, 1.0), quantize_percentage=0.25)
    assert {policy.draw_budget(48) for _ in range(100)} == {0, 12, 24, 36, 48}
    for low, high in ((0.05, 0.1), (0.1, 0.12), (0.3, 0.35)):
        narrow = build_policy("random", BLOCK, budgets=(low, high), quantize_percentage=1 / 4)
        assert all(low <= narrow.draw_budget(64) / 64 <= high for _ in range(20))
    fixed = build_policy("reinforce", BLOCK, budgets=(0.4, 0.4), quantize_percentage=0.25)
    assert {fixed.draw_budget(48) for _ in range(10)} == {19}


def test_small_budgets_may_come_more_often():
    torch.manual_seed(0)
    policy = build_policy("random", BLOCK, budgets=(0.1, 1.0), budget_power=6.0)
    shares = torch.tensor([policy.draw_share() for _ in range(2000)])
    assert shares.unique().tolist() == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1.0])
    # u^6 is below a tenth in 68 % of all draws, and above nine tenths in 1.7 %.
    assert float((shares < 0.2).float().mean()) == pytest.approx(0.1 ** (1 / 6), abs=0.03)
    assert float((shares > 0.9).float().mean()) == pytest.approx(1 - 0.9 ** (1 / 6), abs=0.01)
    assert float(shares.mean()) == pytest.approx(0.1 + 0.9 / 7, abs=0.03)
    with pytest.raises(ValueError, match="budget_power"):
        build_policy("random", BLOCK, budget_power=0.0)


def test_drawing_a_budget_leaves_the_policy_random():
    """Different draws, and a record whose probabilities spend the budget."""
    policy = build_policy("reinforce", BLOCK, budgets=(0.5, 0.5))
    decisions = [policy(images()) for _ in range(4)]
    assert len({tuple(d.grid.flatten().tolist()) for d in decisions}) > 1
    for d in decisions:
        assert d.n_high == 12
        assert torch.allclose(d.probs.sum((1, 2)), torch.full((2,), 6.0), atol=1e-3)
        assert d.log_probs.requires_grad


def test_a_budget_at_call_time_wins_over_those_of_training():
    policy = build_policy("reinforce", BLOCK, budgets=(0.9, 1.0))
    assert (policy(images(), budget=2).grid.sum((1, 2)) == 2).all()


@pytest.mark.parametrize("budgets", [(0.6, 0.4), (-0.1, 0.5), (0.5, 1.5), (0.5,)])
def test_budgets_that_make_no_sense(budgets):
    with pytest.raises(ValueError, match="lowest"):
        build_policy("random", BLOCK, budgets=budgets)


# ---- warm-up ----


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_warm_up_begins_at_random_with_its_share(share):
    policy = build_policy("reinforce", BLOCK, 0.5, quantize_percentage=0, warmup_share=share)
    policy.policy_net.layers[-1].bias.data.fill_(-50)  # the policy itself wants nothing
    policy.exploration = 1.0
    drawn = torch.stack([policy(images(8)).grid for _ in range(20)]).float()
    assert abs(float(drawn.mean()) - share) < 0.05
    policy.exploration = 0.5
    assert 0.4 * share < policy(images(64)).grid.float().mean() < 0.6 * share
    policy.exploration = 0.0
    assert not policy(images()).grid.any()


def test_warm_up_takes_imposed_budgets_along():
    policy = build_policy(
        "reinforce", BLOCK, budgets=(0.25, 0.25), quantize_percentage=0, warmup_share=1.0
    )
    counts = []
    for exploration in (1.0, 0.5, 0.0):
        policy.exploration = exploration
        counts.append(policy.draw_budget(16))
    assert counts == [16, 10, 4]
    policy.exploration = 1.0
    policy.eval()
    assert torch.equal(policy(images(), budget=3).grid, policy(images(), budget=3).grid)


def test_sparsity_waits_for_the_warm_up():
    policy = build_policy("reinforce", BLOCK, 0.0, sparsity_weight=2.0)
    share = torch.tensor(0.5)
    rewards = []
    for exploration in (1.0, 0.5, 0.0):
        policy.exploration = exploration
        rewards.append(float(policy._sparsity(share)))
    assert rewards == [0.0, -0.5, -1.0]


# ---- rewards ----


def step(task, **settings):
    """(policy's loss, gradient of the logits, stats) for block losses `task` (N, Gh, Gw)."""
    torch.manual_seed(0)
    policy = build_policy("reinforce", BLOCK, quantize_percentage=0, **settings)
    model = SegBlocksModel(nn.Conv2d(3, 2, 1), policy)
    result = model(images(*task.shape))
    pixels = spread(task)
    loss, stats = policy.loss(result, pixels, torch.ones_like(pixels, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, result.scores)
    return loss, gradient, stats


def test_a_normalised_advantage_does_not_fade_with_the_loss():
    task = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(3))
    settings = {"sparsity_weight": 0.0}
    large, small = (
        step(scale * task, normalise_advantage=True, **settings)[2]["task_advantage"]
        for scale in (1.0, 0.01)
    )
    assert float(large) == pytest.approx(float(small), rel=1e-4)
    expected = ((task - task.mean()).abs() / task.std(correction=0)).mean()
    assert float(large) == pytest.approx(float(expected), rel=1e-4)
    plain = step(0.01 * task, **settings)[2]["task_advantage"]
    assert small > 5 * plain


def test_entropy_is_relative_to_a_share():
    logits, share = torch.tensor([-2.0, 0.0, 3.0]), 0.2
    probs = logits.sigmoid()
    expected = -(probs * probs.log() + (1 - probs) * (1 - probs).log())
    assert torch.allclose(entropy(logits), expected, atol=1e-6)
    of_both = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(probs), torch.distributions.Bernoulli(torch.tensor(share))
    )
    assert torch.allclose(divergence_from_share(logits, torch.tensor(share)), of_both, atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "settings"),
    [
        (0.2, {"percent_target": 0.2}),
        (0.25, {"budgets": (0.25, 0.25)}),
        (0.75, {"budgets": (0.75, 0.75)}),
    ],
)
def test_entropy_pulls_towards_the_wanted_share(wanted, settings):
    task = torch.zeros(2, 3, 4)
    plain, pulled = ({"sparsity_weight": 0.0, "entropy_weight": weight} for weight in (0.0, 0.5))
    assert (step(task, **settings, **plain)[1] == 0).all()
    _, gradient, stats = step(task, **settings, **pulled)
    torch.manual_seed(0)
    probs = build_policy("reinforce", BLOCK, **settings)(images(*task.shape)).probs.detach()
    assert torch.equal(gradient.sign(), (probs - wanted).sign())  # descent moves them to the share
    assert 0 < stats["entropy"] < 0.7


@pytest.mark.parametrize("settings", [{"percent_target": 0.0}, {"budgets": (1.0, 1.0)}])
def test_entropy_of_no_block_and_of_all_is_finite(settings):
    _, gradient, stats = step(torch.rand(2, 3, 4), entropy_weight=0.5, **settings)
    assert gradient.isfinite().all()
    assert stats["entropy"].isfinite()


def test_the_share_is_no_reward_where_the_budget_is_imposed():
    _, gradient, stats = step(torch.zeros(2, 3, 4), budgets=(0.5, 0.5), sparsity_weight=9.0)
    assert stats["sparsity_reward"] == 0
    assert (gradient == 0).all()


# ---- the fitted threshold ----


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("quantize", [0.0, 1 / 16, 1 / 4])
def test_a_fitted_threshold_realises_the_share_of_other_images(share, quantize):
    policy = build_policy("reinforce", BLOCK, share, quantize).eval()
    generator = torch.Generator().manual_seed(2)
    every = torch.randn(400, 6, 8, generator=generator) * 2 - 1
    every = every + torch.randn(400, 1, 1, generator=generator)  # images differ
    told = policy.calibrate(list(every[:200]))
    assert told == pytest.approx(share, abs=0.01)
    chosen = [Decision(policy.choose(x), policy.choose(x), scores=x) for x in every[200:, None]]
    realised = [policy.settle(decision).grid.float().mean() for decision in chosen]
    assert float(torch.stack(realised).mean()) == pytest.approx(share, abs=0.05)


def test_no_threshold_without_scores_or_from_nan():
    with pytest.raises(ValueError, match="no images"):
        fit_threshold([], 0.5, lambda chosen, total: chosen)
    with pytest.raises(ValueError, match="not finite"):
        fit_threshold([torch.tensor([[1.0, torch.nan]])], 0.5, lambda chosen, total: chosen)


def test_compiled_model_obeys_the_threshold():
    torch.manual_seed(0)
    policy = build_policy("reinforce", BLOCK, 0.25, quantize_percentage=0)
    model = SegBlocksModel(nn.Conv2d(3, 2, 3, padding=1), policy).eval()
    image = images(1, 4, 4)
    before = model(image).grid
    policy.calibrate([policy.logits(image)[0]])
    after = model(image).grid
    assert int(after.sum()) == 4 != int(before.sum())
    assert torch.equal(segblocks.compile(model, image)(image).grid, after)
