"""Where full resolution goes: shares by class, rank correlation with the oracle, trimap mIoU."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import REINFORCE, figures, run, tiny_backbone  # noqa: F401

from dataloaders import DatasetInfo
from utils.validation.policy_metrics import PolicyMetrics, near_boundary, rank_correlation

pytestmark = pytest.mark.usefixtures("tiny_backbone")

WIDE = (*REINFORCE, "--synthetic-size", "128", "256", "--res", "256", "--crop-res", "128")
INFO = DatasetInfo("two", ("sky", "pole"), ((0, 0, 0), (9, 9, 9)), ("pole",))


class Result:
    def __init__(self, grid, scores=None):
        self.grid = torch.tensor(grid)
        self.scores = scores


def test_near_a_boundary_by_hand():
    label = torch.zeros(1, 1, 10, dtype=torch.int64)
    label[..., 4:] = 1
    label[..., 8:] = 255

    def band(pixels):
        return near_boundary(label, 255, pixels).int().flatten().tolist()

    assert band(0) == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert band(2) == [0, 1, 1, 1, 1, 1, 1, 0, 0, 0]  # and void is no class
    assert near_boundary(label.transpose(1, 2), 255, 2).flatten().tolist() == [
        bool(b) for b in band(2)
    ]


def test_near_a_boundary_is_a_distance():
    """Against every pair of pixels."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 2, (1, 4, 4), generator=generator).repeat_interleave(5, 1)
    label = label.repeat_interleave(5, 2)
    edges = near_boundary(label, 255, 0)[0].nonzero()
    y, x = torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")
    gap = torch.stack([(y - e[0]).abs().maximum((x - e[1]).abs()) for e in edges]).amin(0)
    assert torch.equal(near_boundary(label, 255, 3)[0], gap <= 3)


def test_figures_by_hand():
    metrics = PolicyMetrics(INFO, block_size=8)
    label = torch.zeros(1, 8, 24, dtype=torch.int64)
    label[..., 20:] = 1
    label[:, :2] = 255
    prediction = label.clamp(max=1)
    prediction[..., 21:] = 0  # wrong on the far side of the boundary, band or not
    result = Result([[[True, False, True]]], torch.tensor([[[3.0, 1.0, 2.0]]]))
    metrics.update(0, prediction, label, result, torch.tensor([[[0.5, 0.1, 0.9]]]))
    found = metrics.compute()
    assert found.share_per_class == {"sky": pytest.approx(12 / 20), "pole": 1.0}
    # Band: columns 16..23. Sky: 4 right, 3 predicted besides; pole: 1 of 4 right.
    assert found.boundary_miou == pytest.approx((4 / 7 + 1 / 4) / 2)
    assert found.rank_correlation == pytest.approx(0.5, abs=1e-4)
    assert set(found.scalars()) == {
        "val_policy/boundary_miou", "val_policy/rank_correlation",
        "val_policy/rank_correlation_pooled", "val_share/sky", "val_share/pole",
    }  # fmt: skip


def test_rank_correlation():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(scores, scores.exp()) == pytest.approx(1, abs=1e-4)
    assert rank_correlation(scores, -scores) == pytest.approx(-1, abs=1e-4)
    tied = torch.tensor([1.0, 2.0, 2.0, 3.0])  # both of rank 2.5
    assert rank_correlation(scores, tied) == pytest.approx(0.9487, abs=1e-4)
    assert math.isnan(rank_correlation(scores, torch.ones(4)))
    assert math.isnan(rank_correlation(scores[:1], scores[:1]))


def test_within_images_and_over_all_of_them_differ():
    """Ranks within each image are right, those between the images wrong; blocks of void count
    for nothing."""
    metrics = PolicyMetrics(INFO, block_size=8)
    label = torch.zeros(1, 8, 24, dtype=torch.int64)
    label[..., 16:] = 255
    images = (((9.0, 8.0), (0.2, 0.1)), ((2.0, 1.0), (0.9, 0.8)))
    for index, (scores, gains) in enumerate(images):
        result = Result([[[True, False, True]]], torch.tensor([[[*scores, -50.0]]]))
        metrics.update(index, label.clamp(max=1), label, result, torch.tensor([[[*gains, 50.0]]]))
    found = metrics.compute()
    assert found.rank_correlation == pytest.approx(1, abs=1e-4)
    assert found.rank_correlation_pooled == pytest.approx(-0.6, abs=1e-4)


def test_oracle_agrees_with_itself_and_a_dense_network_ranks_nothing(tmp_path):
    flags = [*WIDE, "--policy-metrics", "yes"]
    folder = run(tmp_path, *flags, "--segblocks-policy", "oracle", "--max-steps", "1")
    run(tmp_path, *flags, "--segblocks-policy", "oracle", "--mode", "val", "--budget", "0.5")
    found = figures(folder, "val.json")
    assert found["policy_metrics"]["rank_correlation"] == pytest.approx(1, abs=1e-4)
    assert 0 <= found["policy_metrics"]["boundary_miou"] <= 1
    # What the oracle looks at first is no part of the operations.
    run(tmp_path, *flags, "--segblocks-policy", "random", "--mode", "val", "--budget", "0.5")
    assert figures(folder, "val.json")["gmacs"] == pytest.approx(found["gmacs"])
    dense = run(tmp_path, "--policy-metrics", "yes", "--max-steps", "1", "--name", "dense")
    run(tmp_path, "--policy-metrics", "yes", "--mode", "val", "--name", "dense")
    metrics = figures(dense, "val.json")["policy_metrics"]
    assert metrics["rank_correlation"] is None
    assert set(metrics["share_per_class"].values()) <= {1.0, None}


def test_they_are_logged_and_change_no_other_figure(tmp_path):
    folder = run(tmp_path, *WIDE, "--max-steps", "1", "--policy-metrics", "yes")
    run(tmp_path, *WIDE, "--mode", "val")
    plain = figures(folder, "val.json")
    assert plain["policy_metrics"] is None
    run(tmp_path, *WIDE, "--mode", "val", "--policy-metrics", "yes")
    metrics = figures(folder, "val.json")
    for name in ("miou", "share", "gmacs", "iou"):
        assert metrics[name] == plain[name]
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"val_policy/boundary_miou", "val_share/road"} <= set(events.Tags()["scalars"])
    assert "rank correlation with the oracle" in (folder / "run.log").read_text()
