"""Policies: names, budgets, rounding up, REINFORCE, and the policies to compare with."""

import contextlib
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segblocks import SegBlocksModel, build_policy
from segblocks.policy import POLICIES, Decision

NAMES = ["reinforce", "random", "middle", "heuristic", "oracle", "disabled"]
RANKING = ["reinforce", "random", "middle", "heuristic"]  # decide from the image alone
BLOCK = 16


def images(n=2, gh=3, gw=4, block=BLOCK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, gh * block, gw * block, generator=generator)


class Fixed(nn.Module):
    """A network of one weight, at the stride of the image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.conv(x)


# -- building ------------------------------------------------------------------------------------


def test_names():
    assert sorted(POLICIES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_the_published_ones(name):
    policy = build_policy(name)
    assert policy.block_size == 128
    assert policy.percent_target == 0.5
    assert policy.quantize_percentage == 1 / 16
    assert policy.learns == (name == "reinforce")
    assert policy.needs_pixel_loss == (name == "oracle")
    if policy.learns:
        assert policy.sparsity_weight == 1.0
    else:
        assert list(policy.parameters()) == []
        assert policy.state_dict() == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "reinforced"}, "reinforce, random, middle, heuristic, oracle, disabled"),
        ({"block_size": 127}, "even"),
        ({"block_size": 0}, "even"),
        ({"block_size": -2}, "even"),
        ({"block_size": 64.0}, "even"),
        ({"percent_target": 40}, "between 0 and 1"),
        ({"percent_target": -0.1}, "between 0 and 1"),
        ({"percent_target": float("nan")}, "between 0 and 1"),
        ({"quantize_percentage": 2}, "between 0 and 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        build_policy(**{"name": "random", **settings})


def test_images_that_are_not_made_of_blocks():
    with pytest.raises(ValueError, match="block_size"):
        build_policy("random", BLOCK)(images()[..., :-1])


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANKING)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("budget", "count"),
    [(0, 0), (1, 1), (5, 5), (12, 12), (0.0, 0), (0.25, 3), (0.4, 5), (1.0, 12)],
)
def test_budget_is_exact_in_every_image(name, training, budget, count):
    policy = build_policy(name, BLOCK, percent_target=0.5).train(training)
    decision = policy(images(), budget)
    assert decision.grid.dtype == torch.bool
    assert decision.grid.flatten(1).sum(1).tolist() == [count, count]
    assert decision.n_high == 2 * count
    assert torch.equal(decision.sampled, decision.grid)


@pytest.mark.parametrize("name", RANKING)
def test_budget_takes_the_highest_scores(name):
    decision = build_policy(name, BLOCK).eval()(images(), 5)
    for scores, grid in zip(decision.scores.flatten(1), decision.grid.flatten(1)):
        assert scores[grid].min() >= scores[~grid].max()


def test_budget_grows_by_adding_blocks():
    policy = build_policy("reinforce", BLOCK).eval()
    grids = [policy(images(), count).grid for count in range(13)]
    for fewer, more in pairwise(grids):
        assert not (fewer & ~more).any()


def test_equal_scores_and_nan():
    policy = build_policy("reinforce", BLOCK)
    scores = torch.tensor([[[1.0, torch.nan, 1.0, torch.nan], [1.0, -torch.inf, 0.0, 2.0]]])
    assert policy.spend(scores, 3).grid.flatten().nonzero().flatten().tolist() == [0, 2, 7]
    assert policy.spend(scores, 6).grid.flatten().nonzero().flatten().tolist() == [0, 2, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (13, ValueError, "0 to 12"),
        (-1, ValueError, "0 to 12"),
        (1.5, ValueError, "between 0 and 1"),
        (-0.5, ValueError, "between 0 and 1"),
        (40, ValueError, "0.4 for 40"),
        (float("nan"), ValueError, "between 0 and 1"),
        (True, TypeError, "share"),
        ("half", TypeError, "share"),
    ],
)
def test_budgets_out_of_range(budget, error, message):
    with pytest.raises(error, match=message):
        build_policy("random", BLOCK)(images(), budget)


# -- rounding up ---------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 2, 6, 15, 16, 17, 30, 128, 133])
@pytest.mark.parametrize("quantize", [0, 1 / 16, 0.1, 1 / 3, 1])
def test_number_of_high_blocks_is_rounded_up(total, quantize):
    """Up to a multiple of total · quantize_percentage, which need not divide the total."""
    policy = build_policy("reinforce", BLOCK, quantize_percentage=quantize)
    step = max(1, round(total * quantize))
    counts = set()
    for count in {0, 1, total // 3, total // 2, total - 1, total}:
        sampled = (torch.randperm(total) < count).view(1, 1, total)
        scores = torch.randn(1, 1, total)
        decision = policy.settle(Decision(sampled, sampled, scores=scores))
        n_high = int(decision.grid.sum())
        counts.add(n_high)
        assert decision.n_high == n_high
        assert torch.equal(decision.sampled, sampled)
        assert not (sampled & ~decision.grid).any()
        assert torch.equal(policy.promote(decision, n_high).grid, decision.grid)
        assert n_high == total or n_high % step == 0
        assert count <= n_high < count + step
        promoted, left = decision.grid & ~sampled, ~decision.grid
        if promoted.any() and left.any():
            assert scores[promoted].min() >= scores[left].max()
    assert 0 in counts
    assert total in counts


def test_rounding_counts_the_whole_batch():
    policy = build_policy("reinforce", BLOCK, quantize_percentage=1 / 4)
    sampled = torch.zeros(2, 2, 2, dtype=torch.bool)
    sampled[1, 0, 0] = True
    scores = torch.tensor([[[0.0, 9.0], [1.0, 2.0]], [[-5.0, 0.5], [0.1, 0.2]]])
    grid = policy.settle(Decision(sampled, sampled, scores=scores)).grid
    assert grid.tolist() == [[[False, True], [False, False]], [[True, False], [False, False]]]


def test_rounding_repeats():
    policy = build_policy("reinforce", BLOCK)
    sampled = torch.rand(2, 5, 9) < 0.3
    scores = torch.randn(2, 5, 9).round()  # many ties
    decision = Decision(sampled, sampled, scores=scores)
    assert torch.equal(policy.settle(decision).grid, policy.settle(decision).grid)


@pytest.mark.parametrize("training", [False, True])
def test_rounding_can_be_put_off(training):
    """What is put off gives what is not."""
    policy = build_policy("reinforce", BLOCK).train(training)
    image = torch.randn(2, 3, 4 * BLOCK, 5 * BLOCK)
    torch.manual_seed(0)
    later = policy(image, settled=False)
    torch.manual_seed(0)
    now = policy(image)
    assert later.n_high is None
    assert later.grid is later.sampled
    settled = policy.settle(later)
    assert settled.n_high == now.n_high
    assert torch.equal(settled.sampled, now.sampled)
    assert torch.equal(settled.grid, now.grid)
    assert policy(image, budget=0.4, settled=False).n_high == 2 * 8, "known, so there is no need"


# -- the others ----------------------------------------------------------------------------------


def test_random_places_the_target_share_anywhere():
    policy = build_policy("random", BLOCK, 0.25)
    grids = torch.stack([policy(images()).grid for _ in range(50)])
    assert (grids.flatten(2).sum(2) == 3).all()
    assert len({tuple(g.flatten().tolist()) for g in grids}) > 25
    assert grids.float().mean(0).min() > 0.05


@pytest.mark.parametrize(
    ("gh", "target", "rows"),
    [
        (4, 0.5, [1, 2]),
        (5, 0.2, [2]),
        (5, 0.6, [1, 2, 3]),
        (3, 1.0, [0, 1, 2]),
        (8, 0.4, [2, 3, 4]),
    ],
)
def test_middle_takes_whole_rows_round_the_centre(gh, target, rows):
    grid = build_policy("middle", BLOCK, target)(images(2, gh, 6)).grid
    expected = torch.zeros(2, gh, 6, dtype=torch.bool)
    expected[:, rows] = True
    assert torch.equal(grid, expected)


def test_heuristic_compares_the_lost_detail_with_its_target():
    image = torch.zeros(1, 3, 16, 48)
    image[:, :, :, 16:32:2] = 1  # stripes of one pixel: every pixel is 0.5 from its 4×4 average
    image[:, :, :, 32:48] = 7  # bright, but plain
    decision = build_policy("heuristic", 16, 0.5, quantize_percentage=0)(image)
    assert decision.scores.flatten().tolist() == pytest.approx([0, 1.5, 0])
    assert decision.grid.flatten().tolist() == [False, True, False]
    assert not build_policy("heuristic", 16, 1.0, 0)(image * 0.6).grid.any()


@pytest.mark.parametrize("fails", [False, True])
def test_oracle_leaves_every_module_in_its_mode(fails):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model = SegBlocksModel(net, build_policy("oracle", 16, 0.5, 0)).train()
    net[1].eval()  # frozen
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def pixel_loss(logits):
        if fails:
            raise RuntimeError("no such loss")
        return logits.mean(1)

    with contextlib.suppress(RuntimeError):
        model.block_gain(torch.randn(1, 3, 32, 32), pixel_loss)
    assert [m.training for m in net] == [True, False, True]
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_oracle_takes_the_blocks_that_gain():
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, :16, 16:] = torch.randn(1, 3, 16, 16) * 3  # only this block has detail to lose
    model = SegBlocksModel(nn.Identity(), build_policy("oracle", 16, 0.5, 0)).eval()

    def pixel_loss(logits):
        return (logits - image).abs().sum(1)

    result = model(image, pixel_loss=pixel_loss)
    assert result.grid.tolist() == [[[False, True], [False, False]]]
    assert result.scores[0, 0, 1] > 1
    assert model(image, budget=1, pixel_loss=pixel_loss).grid.tolist() == result.grid.tolist()
    with pytest.raises(ValueError, match="pixel_loss"):
        model(image)


def test_disabled_is_the_dense_network():
    image = images(2, 3, 4)[..., :41, :50]
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.InstanceNorm2d(4))  # not for blocks
    result = SegBlocksModel(net, build_policy("disabled", BLOCK))(image)
    # Padded and cropped like every other policy, so that it is what all blocks high would give.
    padded = F.pad(image, (0, 4 * BLOCK - 50, 0, 3 * BLOCK - 41))
    assert torch.equal(result.logits, net(padded)[..., :21, :25])
    assert result.grid.shape == (2, 3, 4)
    assert result.grid.all()
    assert result.share == 1
    assert result.log_probs is None
    with pytest.raises(ValueError, match="budget"):
        SegBlocksModel(net, build_policy("disabled", BLOCK))(image, budget=0.5)
    with pytest.raises(ValueError, match="no budgets"):
        build_policy("disabled", BLOCK, budgets=(0.1, 0.2))


@pytest.mark.parametrize("name", ["random", "middle", "heuristic", "disabled"])
def test_policies_that_do_not_learn_have_no_loss(name):
    model = SegBlocksModel(Fixed(), build_policy(name, BLOCK))
    result = model(images())
    loss, stats = model.policy.loss(result, torch.rand(2, 48, 64), torch.ones(2, 48, 64).bool())
    assert loss.shape == ()
    assert loss == 0
    assert stats == {"share": result.share}


def test_lower_precision_images():
    for name in RANKING:
        policy = build_policy(name, BLOCK).eval()
        if name == "reinforce":
            policy = policy.to(torch.bfloat16)
        assert policy(images().to(torch.bfloat16), 5).grid.flatten(1).sum(1).tolist() == [5, 5]
