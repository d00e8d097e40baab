"""Validation: what it leaves alone, budgets and placements, shares by block, operations."""

import copy
from argparse import Namespace
from functools import partial

import pytest
import torch
from tiny import (  # noqa: F401
    DEVICES,
    REINFORCE,
    arguments,
    checkpoint,
    figures,
    make_trainer,
    run,
    same,
    tiny_backbone,
)

import train
from argparser import parse_args
from segblocks import SegBlocksModel
from utils.data import build_val_set
from utils.logger import RunLog
from utils.macs import MacCounter, count
from utils.validation.evaluate import Kept, evaluate
from utils.validation.judge import BlockShares, Judge, block_shares, blocks_with, count_blocks

pytestmark = pytest.mark.usefixtures("tiny_backbone")


def test_validation_touches_neither_weights_nor_random_numbers(tmp_path):
    trainer = make_trainer(tmp_path, *REINFORCE, "--segblocks-policy", "random")
    trainer.model.train()
    before, drawn = copy.deepcopy(trainer.model.state_dict()), torch.get_rng_state()
    with RunLog(tmp_path / "log") as log:
        first, second = (
            evaluate(trainer.model, trainer.val_loader, trainer.args, trainer.device, log)
            for _ in range(2)
        )
    assert same(before, trainer.model.state_dict())
    assert torch.equal(drawn, torch.get_rng_state())
    assert trainer.model.training
    assert str(first) == str(second)  # random placement included; as text, where NaN equals NaN


def test_the_policy_is_an_image_ahead(tmp_path, monkeypatch):
    events, decide, judge = [], SegBlocksModel.decide, Judge.__call__

    def noted_decision(self, *given):
        events.append("decide")
        return decide(self, *given)

    def noted_judge(self, *given):
        events.append("judge")
        return judge(self, *given)

    monkeypatch.setattr(SegBlocksModel, "decide", noted_decision)
    monkeypatch.setattr(Judge, "__call__", noted_judge)
    trainer = make_trainer(tmp_path, *REINFORCE, "--synthetic-val-images", "3")
    with RunLog(tmp_path / "log") as log:
        evaluate(trainer.model, trainer.val_loader, trainer.args, trainer.device, log)
    assert events == ["decide", "decide", "judge", "decide", "judge", "judge"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flags", [(), REINFORCE], ids=["dense", "blocks"])
def test_a_kept_copy_validates_present_weights(tmp_path, flags, device):
    """On CUDA from graphs."""
    trainer = make_trainer(tmp_path, *flags, "--device", device)
    kept, shared = Kept(trainer.args, trainer.device), {}
    written = Namespace(**{**vars(trainer.args), "cuda_graphs": False})
    with RunLog(tmp_path / "log") as log:
        for step in range(4):
            again, fresh = (
                evaluate(trainer.model, trainer.val_loader, args, trainer.device, log, kept=copies)
                for args, copies in ((trainer.args, kept), (written, None))
            )
            # Of images that two passes round differently a pixel may change its class.
            assert again.miou == pytest.approx(fresh.miou, abs=1e-3)
            assert again.share == fresh.share
            assert again.gmacs == fresh.gmacs
            shared[step] = fresh.miou
            with torch.no_grad():
                for i, value in enumerate(trainer.model.state_dict().values()):
                    if value.is_floating_point():
                        value.add_(torch.randn_like(value), alpha=0.1 * (i % 3))
    assert len(set(shared.values())) > 1
    kept_copy = kept.copy.of(trainer.model)
    own = {p.data_ptr() for p in trainer.model.parameters()}
    assert not own & {p.data_ptr() for p in kept_copy.parameters()}
    if device == "cuda":
        assert kept_copy.graphs.captured(kept_copy.net) >= 1
        kept.copy.release()
        assert kept_copy.graphs.captured(kept_copy.net) == 0


@pytest.mark.parametrize("policy", ["random", "middle", "heuristic", "oracle", "reinforce"])
def test_every_policy_trains_and_validates(tmp_path, policy):
    flags = [*REINFORCE, "--segblocks-policy", policy, "--max-steps", "1"]
    folder = run(tmp_path, *flags)
    run(tmp_path, *flags, "--mode", "val", "--budget", "0.5")
    assert figures(folder, "val.json")["share"] == 0.5


def test_budget_spends_what_it_says_on_a_policy_trained_for_more(tmp_path):
    folder = run(tmp_path, *REINFORCE, "--max-steps", "1")
    macs = []
    for budget in ("0", "1", "2"):
        run(tmp_path, *REINFORCE, "--mode", "val", "--budget", budget)
        found = figures(folder, "val.json")
        assert found["share"] == int(budget) / 2
        macs.append(found["gmacs"])
    assert macs[0] < macs[1] < macs[2]


def test_random_placement_with_the_weights_of_a_learned_policy(tmp_path):
    folder = run(tmp_path, *REINFORCE, "--max-steps", "1")
    flags = ["--segblocks-policy", "random", "--budget", "1", "--name", "random"]
    path = str(folder / "checkpoint.pth")
    other = run(tmp_path, *REINFORCE, *flags, "--mode", "val", "--resume", path)
    assert figures(other, "val.json")["share"] == 0.5


def test_blocks_with_small_classes():
    label = torch.zeros(1, 6, 8, dtype=torch.int64)
    label[0, 5, 7] = 3
    label[0, 0, 0] = 255
    found = blocks_with(label, torch.tensor([3, 255]), block_size=4)
    assert found.tolist() == [[[True, False], [False, True]]]
    assert not blocks_with(label, torch.tensor([], dtype=torch.int64), block_size=4).any()


def test_block_shares_by_hand():
    grid = torch.tensor([[[True, False, True, True]]])
    label = torch.zeros(1, 2, 8, dtype=torch.int64)
    label[0, 0, [0, 2]] = 3  # blocks 0 and 1 of size 2
    shares = BlockShares()
    shares.update(count_blocks(grid, label, torch.tensor([3]), 2))
    assert block_shares([shares.counts_on_host()]) == {
        "share": 0.75,
        "share_small": 0.5,
        "share_plain": 1.0,
    }


def test_macs_of_the_parts_add_up(tmp_path):
    args = parse_args(arguments(tmp_path, *REINFORCE))
    model = train.build(args, build_val_set(args)).eval()
    counter = MacCounter()
    with torch.no_grad():
        for budget in (0, 2, 2, 0):
            counter.add((64, 128), budget, partial(model, torch.zeros(1, 3, 64, 128), budget))
    gmacs = counter.gmacs()
    total = gmacs.pop("total")
    assert gmacs.keys() == {"policy", "net.backbone", "net.spp", "net.upsample", "net.logits"}
    assert sum(gmacs.values()) == pytest.approx(total)
    # By hand: output pixels × inputs × outputs × kernel², at all blocks high.
    dense = 512 * 3 * 8 * 25 + 128 * 8 * 8 * 9 + 32 * 8 * 12 * 9 + 8 * 12 * 16 * 9
    assert gmacs["net.backbone"] * 1e9 == pytest.approx(dense * (1 + 1 / 4) / 2)


@pytest.mark.parametrize("first", [(0, 8), (5, 4)])
@pytest.mark.parametrize("legacy", [False, True])
def test_macs_of_two_numbers_of_blocks_tell_those_of_all(tmp_path, legacy, first):
    args = parse_args(arguments(tmp_path, *REINFORCE))
    model = train.build(args, build_val_set(args)).eval()
    model.legacy_upsample = legacy
    runs = [partial(model, torch.zeros(1, 3, 128, 256), n) for n in range(9)]
    counter, counted = MacCounter(), []
    with torch.no_grad():
        for n in (*first, *range(9)):
            counter.add((128, 256), n, lambda n=n: counted.append(n) or runs[n]())
        assert counted == list(first)
        found, known = counter.gmacs(), [count(run) for run in runs]
    for name in known[0]:
        expected = sum(known[n][name] for n in (*first, *range(9))) / 11e9
        assert found[name] == pytest.approx(expected, rel=1e-12)


# ---- logs ----
