"""Optimiser steps from one CUDA graph do what steps without graphs do."""

import pytest
import torch
from tiny import DEVICES, REINFORCE, checkpoint, run, same, tiny_backbone  # noqa: F401

from utils.training.objective import Objective
from utils.training.uploads import Uploads
from utils.training.whole_step import WholeSteps

pytestmark = pytest.mark.usefixtures("tiny_backbone")
# Three steps an epoch, of two images of four blocks.
SHORT = (
    "--epochs 3 --synthetic-size 128 256 --res 256 --crop-res 128 --synthetic-train-images 6 "
    "--batch-size 2 --log-every 2"
).split()
EXACT = (*REINFORCE, "--segblocks-budgets", "0.5", "0.5")


@pytest.fixture
def captured(monkeypatch):
    """Captures that there were."""
    found, capture = [], WholeSteps._capture

    def noted(self, *given):
        found.append(capture(self, *given))
        return found[-1]

    monkeypatch.setattr(WholeSteps, "_capture", noted)
    return found


def both(tmp_path, *flags):
    """What checkpoints hold with and without graphs."""
    flags = (*SHORT, *flags, "--device", "cuda", "--deterministic", "yes")
    try:
        return [
            checkpoint(run(tmp_path / graphs, *flags, "--cuda-graphs", graphs))
            for graphs in ("yes", "no")
        ]
    finally:
        torch.use_deterministic_algorithms(False)


class TestOnCuda:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize(
        ("flags", "captures"),
        [
            ((), 1),
            (EXACT, 1),
            ((*EXACT, "--grad-clip", "0.1", "--ema", "0.9"), 1),
            ((*EXACT, "--amp", "bf16", "--jitter", "0"), 1),
            ((*EXACT, "--segblocks-reward", "balanced", "--segblocks-recolour", "yes"), 1),
            ((*EXACT, "--segblocks-refine-epochs", "2", "--segblocks-entropy-weight", "0.5"), 2),
            ((*EXACT, "--segblocks-warmup-epochs", "2"), 1),
            ((*REINFORCE, "--segblocks-policy", "random"), 1),
            ((*REINFORCE, "--segblocks-policy", "oracle", "--segblocks-budgets", "0", "1"), None),
            (REINFORCE, 0),  # the policy decides how many
            ((*EXACT, "--amp", "fp16"), 0),  # the scaler decides whether there is a step
            ((*EXACT, "--accumulate", "3", "--batch-size", "1"), 0),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_weights_are_those_without_graphs(self, tmp_path, captured, flags, captures):
        graphed, plain = both(tmp_path, *flags)
        if captures is not None:
            assert len(captured) == captures
        for entry in ("state_dict", "optimizer", "rng", "reward"):
            assert same(graphed[entry], plain[entry]), entry

    def test_a_run_that_goes_on_captures_anew(self, tmp_path, captured):
        flags = (*SHORT, *EXACT, "--device", "cuda", "--deterministic", "yes")
        try:
            whole = checkpoint(run(tmp_path / "whole", *flags))
            run(tmp_path / "parts", *flags, "--max-steps", "4")
            parts = checkpoint(run(tmp_path / "parts", *flags))
        finally:
            torch.use_deterministic_algorithms(False)
        assert len(captured) == 3
        for entry in ("state_dict", "optimizer", "rng"):
            assert same(whole[entry], parts[entry]), entry

    def test_what_waits_for_the_device_is_launched_in_parts(self, tmp_path, captured, monkeypatch):
        loss_of = Objective.__call__

        def waits(self, image, label, budget=None):
            assert float(image.sum()) == float(image.sum())
            return loss_of(self, image, label, budget)

        monkeypatch.setattr(Objective, "__call__", waits)
        with pytest.warns(UserWarning, match="steps are launched in parts") as told:
            graphed, plain = both(tmp_path, *EXACT)
        assert len([w for w in told if "in parts" in str(w.message)]) == 1
        assert not captured
        assert same(graphed["state_dict"], plain["state_dict"])
        assert same(graphed["rng"], plain["rng"])

    def test_a_kind_of_step_beyond_the_most_runs_in_parts(self, tmp_path, captured, monkeypatch):
        monkeypatch.setattr(WholeSteps, "MOST", 1)
        flags = (
            *REINFORCE,
            "--segblocks-budgets",
            "0",
            "1",
            "--segblocks-quantize-percentage",
            "0",
        )
        graphed, plain = both(tmp_path, *flags)
        assert len(captured) == 1
        assert same(graphed["state_dict"], plain["state_dict"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ahead", [False, True])
def test_uploads_are_the_batches_in_order(device, ahead):
    batches = [[torch.full((1, 3), i), torch.full((2,), -i), torch.tensor([i])] for i in range(4)]
    uploads, found = Uploads(batches, torch.device(device)), []
    for tensors, index in uploads:
        if ahead:
            uploads.ahead()
        assert all(x.device.type == device for x in tensors)
        assert index.device.type == "cpu"
        found.append([*(x.cpu() for x in tensors), index])
    assert same(found, batches)
    assert next(uploads, None) is None
