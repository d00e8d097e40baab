"""Optimiser steps from one CUDA graph do what steps without graphs do."""

import pytest
import torch
from tiny import REINFORCE, checkpoint, run, same, tiny_backbone  # noqa: F401

from utils.training.objective import Objective
from utils.training.uploads import Uploads
from utils.training.whole_step import WholeSteps

pytestmark = pytest.mark.usefixtures("tiny_backbone")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
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
    pytestmark = on_gpu

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
            (REINFORCE, None),  # the policy decides how many: two graphs
            ((*REINFORCE, "--segblocks-recolour", "yes", "--amp", "bf16"), None),
            ((*REINFORCE, "--segblocks-quantize-percentage", "0", "--ema", "0.9"), None),
            ((*REINFORCE, "--segblocks-refine-epochs", "1", "--grad-clip", "0.1"), None),
            ((*REINFORCE, "--segblocks-quantize-percentage", "1"), 2),
            ((*REINFORCE, "--segblocks-policy", "heuristic"), None),
            ((*EXACT, "--amp", "fp16"), 0),  # the scaler decides whether there is a step
            ((*EXACT, "--accumulate", "3", "--batch-size", "1"), 0),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
    )
    def test_weights_are_those_without_graphs(self, tmp_path, captured, flags, captures):
        graphed, plain = both(tmp_path, *flags)
        assert len(captured) == captures if captures is not None else captured
        for entry in ("state_dict", "optimizer", "rng", "reward"):
            assert same(graphed[entry], plain[entry]), entry

    @pytest.mark.parametrize(
        ("kind", "captures"),
        [(EXACT, 3), ((*REINFORCE, "--segblocks-quantize-percentage", "1"), 6)],
        ids=["budget", "decided"],
    )
    def test_a_run_that_goes_on_captures_anew(self, tmp_path, captured, kind, captures):
        flags = (*SHORT, *kind, "--device", "cuda", "--deterministic", "yes")
        try:
            whole = checkpoint(run(tmp_path / "whole", *flags))
            run(tmp_path / "parts", *flags, "--max-steps", "4")
            parts = checkpoint(run(tmp_path / "parts", *flags))
        finally:
            torch.use_deterministic_algorithms(False)
        assert len(captured) == captures
        for entry in ("state_dict", "optimizer", "rng"):
            assert same(whole[entry], parts[entry]), entry

    @pytest.mark.parametrize(
        ("flags", "captures"), [(EXACT, 0), (REINFORCE, 1)], ids=["budget", "decided"]
    )
    def test_what_waits_for_the_device_is_launched_in_parts(
        self, tmp_path, captured, monkeypatch, flags, captures
    ):
        loss_of = Objective.__call__

        def waits(self, image, label, budget=None, decision=None):
            assert float(image.sum()) == float(image.sum())
            return loss_of(self, image, label, budget, decision)

        monkeypatch.setattr(Objective, "__call__", waits)
        with pytest.warns(UserWarning, match="steps are launched in parts") as told:
            graphed, plain = both(tmp_path, *flags)
        assert len([w for w in told if "in parts" in str(w.message)]) == 1
        assert len(captured) == captures  # of a step that had begun
        assert same(graphed["state_dict"], plain["state_dict"])
        assert same(graphed["rng"], plain["rng"])

    @pytest.mark.parametrize(("budgets", "most"), [(("0", "1"), 1), ((), 1), ((), 2)], ids=str)
    def test_a_kind_of_step_beyond_the_most_runs_in_parts(
        self, tmp_path, captured, monkeypatch, budgets, most
    ):
        monkeypatch.setattr(WholeSteps, "MOST", most)
        flags = [*REINFORCE, "--segblocks-quantize-percentage", "0"]
        flags += ["--segblocks-budgets", *budgets] if budgets else []
        graphed, plain = both(tmp_path, *flags)
        assert len(captured) == most
        for entry in ("state_dict", "optimizer", "rng"):
            assert same(graphed[entry], plain[entry]), entry


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
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
