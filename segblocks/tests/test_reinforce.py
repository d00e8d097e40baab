"""The learned policy: its record, its loss and gradients, and that it learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segblocks import SegBlocksModel, build_policy
from segblocks.policy.base import block_mean
from segblocks.policy.place import PLACES, at_blocks, mean_by_place
from segblocks.policy.recolour import recoloured
from segblocks.replicas import Replicas

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


NORM = ("weight", "bias", "running_mean", "running_var")
KEYS = {
    f"policy.policy_net.layers.{name}": shape
    for layer, into, kernel in ((0, 3, 7), (3, 64, 5), (6, 64, 5))
    for name, shape in {
        f"{layer}.weight": (64, into, kernel, kernel),
        **{f"{layer + 1}.{leaf}": (64,) for leaf in NORM},
        f"{layer + 1}.num_batches_tracked": (),
    }.items()
} | {
    "policy.policy_net.layers.9.weight": (1, 64, 5, 5),
    "policy.policy_net.layers.9.bias": (1,),
}  # fmt: skip
OURS = {"policy.threshold": (), "policy.place": PLACES}


def test_parameter_names_are_the_published_ones():
    policy = build_policy("reinforce")
    model = SegBlocksModel(nn.Identity(), policy)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == KEYS | OURS
    assert sum(p.numel() for p in policy.parameters()) == 216_193
    momenta = {m.momentum for m in policy.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.02}


@pytest.mark.parametrize("block", [16, 32, 128])
def test_one_logit_for_each_block(block):
    policy = build_policy("reinforce", block)
    assert policy(images(2, 3, 4, block)).scores.shape == (2, 3, 4)


def test_training_samples_and_evaluation_decides():
    policy = build_policy("reinforce", BLOCK, quantize_percentage=0)
    x = images(4, 6, 8)
    grids = {tuple(policy(x).grid.flatten().tolist()) for _ in range(3)}
    assert len(grids) == 3
    policy.eval()
    first, second = policy(x), policy(x)
    assert torch.equal(first.grid, second.grid)
    assert torch.equal(first.grid, first.scores > 0)


def test_sampling_follows_the_probabilities():
    policy = build_policy("reinforce", BLOCK)
    probability = torch.tensor([0.05, 0.5, 0.9])
    scores = torch.logit(probability).view(1, 1, 3)
    drawn = torch.stack([policy.choose(scores) for _ in range(3000)]).double().mean(0).flatten()
    assert torch.allclose(drawn, probability.double(), atol=0.04)


def test_record_of_the_decision():
    policy = build_policy("reinforce", BLOCK)
    decision = policy(images())
    assert torch.allclose(decision.probs, decision.scores.sigmoid())
    chosen = torch.where(decision.sampled, decision.probs, 1 - decision.probs)
    assert torch.allclose(decision.log_probs, chosen.log(), atol=1e-6)
    assert decision.log_probs.requires_grad
    with pytest.raises(AttributeError):
        decision.grid = None


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (16, 16), (6, 20), (1, 1)])
def test_a_mean_by_place_is_that_of_pictures_of_any_size(rows, columns):
    scores = torch.randn(5, rows, columns, generator=torch.Generator().manual_seed(0))
    mean = scores.mean(0)
    found = at_blocks(mean_by_place(scores), rows, columns)
    if (rows, columns) == PLACES:
        assert torch.equal(found, mean)
    assert float(found.min()) >= float(mean.min()) - 1e-6
    assert float(found.max()) <= float(mean.max()) + 1e-6
    flat = mean_by_place(torch.full((2, rows, columns), 0.5))
    assert torch.allclose(at_blocks(flat, 7, 9), torch.full((7, 9), 0.5))
    rising = mean_by_place(torch.arange(rows).view(1, rows, 1).expand(1, rows, columns).float())
    assert (at_blocks(rising, 2 * rows, columns).diff(dim=0) >= -1e-6).all()


def test_evaluation_draws_scores_towards_the_mean_of_their_place():
    policy = build_policy("reinforce", BLOCK, percent_target=0.25, place_weight=2.0)
    x = images(n=6)
    assert torch.equal(policy(x).scores, policy.logits(x)), "training samples by the network alone"
    policy.eval()
    with torch.no_grad():
        logits = policy.logits(x)
        assert torch.equal(policy.scores(x, None), logits), "nothing is added before it was fitted"
        policy.calibrate(list(logits))
        found = policy(x)
    added = at_blocks(2.0 * mean_by_place(logits), 3, 4)
    assert torch.allclose(found.scores, logits + added, atol=1e-6)
    assert float(found.sampled.float().mean()) == pytest.approx(0.25, abs=1 / 72)
    place = policy.place.clone()
    policy.place_weight = 0.0  # as where a checkpoint is calibrated anew
    policy.calibrate(list(logits))
    assert torch.equal(policy.place, place)
    assert float(policy(x).sampled.float().mean()) == pytest.approx(0.25, abs=1 / 72)


def test_places_of_images_of_several_sizes():
    policy = build_policy("reinforce", BLOCK, place_weight=1.0).eval()
    rising = [torch.arange(n).view(n, 1).expand(n, 5).float() / (n - 1) for n in (3, 4, 8)]
    policy.calibrate(rising)
    assert (policy.place.diff(dim=0) >= 0).all()
    assert float(policy.place.max()) == pytest.approx(1)


def test_training_may_see_other_colours_and_evaluation_sees_its_own():
    torch.manual_seed(0)
    policy = build_policy("reinforce", BLOCK, recolour=True)
    plain = build_policy("reinforce", BLOCK)
    plain.load_state_dict(policy.state_dict())
    x = images()
    assert not torch.equal(policy(x).scores, policy(x).scores)
    assert torch.equal(plain(x).scores, plain(x).scores)
    plain.load_state_dict(policy.state_dict())
    assert torch.equal(policy.eval()(x).scores, plain.eval()(x).scores)


def test_other_colours_by_hand():
    """Each pixel's new colour depends on its old one alone, by one affine map an image."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    found = recoloured(x, Replicas()).flatten(2)
    ones = torch.cat((x.flatten(2), torch.ones(4, 1, 30)), 1)
    affine = torch.linalg.lstsq(ones.mT, found.mT).solution.mT  # N,3,4
    assert torch.allclose(affine @ ones, found, atol=1e-6)
    mix, shift = affine.split((3, 1), 2)
    assert (mix >= -1e-9).all()
    assert (mix.sum(2) >= 0.5 * 0.8 - 1e-6).all()
    assert (mix.sum(2) <= 1.5 * 1.2 + 1e-6).all()
    assert shift.abs().max() <= 0.75 + 0.3 + 1e-6
    assert len(shift.unique()) == 12


def reinforce_step(loss_map, valid=None, target=0.5, weight=0.0, quantize=0.0, seed=0):
    """(result, loss, stats, gradient of each block's logit) of one training step."""
    n, height, width = loss_map.shape
    torch.manual_seed(seed)
    policy = build_policy("reinforce", BLOCK, target, quantize, weight)
    model = SegBlocksModel(Fixed(), policy)
    result = model(images(n, -(-height // BLOCK), -(-width // BLOCK))[..., :height, :width])
    valid = torch.ones_like(loss_map, dtype=torch.bool) if valid is None else valid
    loss, stats = model.policy.loss(result, loss_map, valid)
    (gradient,) = torch.autograd.grad(loss, result.scores)
    return result, loss, stats, gradient


def spread(values):
    """(N, Gh, Gw) block values to pixels."""
    return values.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_higher_loss_become_more_probable(seed):
    """Whatever was sampled, following the gradient raises the logit where the loss is high."""
    task = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    result, _, stats, gradient = reinforce_step(spread(task), seed=seed)
    advantage = task - task.mean()
    assert torch.equal(gradient.sign(), -advantage.sign())
    probs = result.probs.detach()
    expected = -torch.where(result.sampled, 1 - probs, probs) * advantage / task.numel()
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert stats["task_advantage"] == pytest.approx(float(advantage.abs().mean()), abs=1e-6)


@pytest.mark.parametrize(("target", "sign"), [(0.0, 1), (1.0, -1)])
def test_the_share_moves_towards_the_target(target, sign):
    _, _, stats, gradient = reinforce_step(torch.zeros(2, 48, 64), target=target, weight=2.0)
    assert (gradient.sign() == sign).all()
    share = float(stats["share"])
    assert float(stats["sparsity_reward"]) == pytest.approx(2 * (target - share), abs=1e-6)


def test_promoted_blocks_earn_no_gradient():
    task = torch.rand(2, 3, 4)
    for seed in range(20):
        result, _, _, gradient = reinforce_step(spread(task), weight=1.0, quantize=0.5, seed=seed)
        promoted = result.grid & ~result.sampled
        if promoted.any():
            break
    assert promoted.any()
    assert (gradient[promoted] == 0).all()
    assert (gradient[~promoted] != 0).all()


def test_ignored_pixels_take_no_part():
    """Neither the number nor the values of ignored pixels change the loss, not even NaN."""
    task = torch.rand(2, 3, 4)
    valid = torch.rand(2, 48, 64) < 0.5
    plain = reinforce_step(spread(task))
    masked = reinforce_step(spread(task), valid)
    poisoned = reinforce_step(spread(task).masked_fill(~valid, torch.nan), valid)
    assert plain[1].item() == pytest.approx(masked[1].item(), rel=1e-5)
    assert masked[1].item() == poisoned[1].item()


def test_blocks_without_valid_pixels_have_no_task_reward():
    task = torch.rand(1, 3, 4)
    valid = spread(torch.ones(1, 3, 4)).bool()
    valid[:, :BLOCK, :BLOCK] = False
    _, _, _, gradient = reinforce_step(spread(task), valid)
    assert gradient[0, 0, 0] == 0
    known = task.flatten()[1:]
    assert torch.equal(gradient.flatten()[1:].sign(), -(known - known.mean()).sign())


def test_images_of_ignored_pixels_only():
    _, loss, stats, gradient = reinforce_step(torch.zeros(2, 48, 64), torch.zeros(2, 48, 64).bool())
    assert loss == 0
    assert (gradient == 0).all()
    assert all(value.isfinite() for value in stats.values())


@pytest.mark.filterwarnings("error")
def test_an_image_of_one_block():
    _, loss, stats, _ = reinforce_step(torch.rand(1, 16, 16), quantize=1 / 16)
    assert loss.isfinite()
    assert all(value.isfinite() for value in stats.values())


def test_loss_maps_that_blocks_do_not_divide():
    result, loss, stats, _ = reinforce_step(torch.rand(2, 41, 50), weight=1.0)
    assert result.grid.shape == (2, 3, 4)
    assert loss.isfinite()
    assert set(stats) == {
        "share", "sparsity_reward", "advantage", "task_advantage", "prob_mean", "prob_std"
    }  # fmt: skip
    assert all(value.dim() == 0 for value in stats.values())


def test_block_mean():
    values = torch.arange(24.0).view(1, 4, 6)
    valid = torch.ones(1, 4, 6, dtype=torch.bool)
    valid[0, 0, 0] = valid[0, 2:, 4:] = False
    mean, known = block_mean(values, 4, valid)
    first = [float(v) for row in values[0] for v in row[:4]][1:]
    assert mean[0, 0, 0] == pytest.approx(sum(first) / 15)
    assert mean[0, 0, 1] == pytest.approx((4 + 5 + 10 + 11) / 4)
    assert known.all()
    assert block_mean(values, 4, valid & False)[1].sum() == 0


def test_gradients_reach_the_policy_and_not_the_network():
    task = spread(torch.rand(1, 2, 2))
    model = SegBlocksModel(Fixed(), build_policy("reinforce", BLOCK))
    result = model(images(1, 2, 2))
    loss, _ = model.policy.loss(result, task.requires_grad_(), torch.ones_like(task).bool())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.policy.parameters())
    assert all(p.grad is None for p in model.net.parameters())
    assert task.grad is None


def test_it_learns_where_resolution_matters():
    """Textured blocks lose at low resolution, plain ones do not: 120 steps find them out."""
    torch.manual_seed(0)
    target = 0.25
    policy = build_policy("reinforce", BLOCK, target, quantize_percentage=0, sparsity_weight=3.0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)

    def scene():
        textured = torch.rand(4, 4, 4, generator=generator) < target
        noise = torch.randn(4, 3, 64, 64, generator=generator)
        return noise * spread(textured.float())[:, None], textured

    model = SegBlocksModel(nn.Identity(), policy)
    for _ in range(120):
        image, textured = scene()
        result = model(image)
        task = torch.where(textured, torch.where(result.grid, 0.5, 1.0), 0.0)
        loss, _ = policy.loss(result, spread(task), torch.ones(4, 64, 64, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    image, textured = scene()
    chosen = model(image).grid
    assert chosen[textured].float().mean() > 0.9
    assert chosen[~textured].float().mean() < 0.1


def test_nearest_rescale_of_the_policy_network():
    """32 pixels a block side, whatever the block."""
    policy = build_policy("reinforce", 64).eval()
    image = images(1, 2, 3, 64)
    small = F.interpolate(image, scale_factor=0.5, mode="nearest")
    assert torch.equal(policy.policy_net(image), policy.policy_net.layers(small)[:, 0])
