"""Several processes that share each batch train and validate as one does."""

import signal

import pytest
import torch
from jobs import Kill, run_job
from tiny import (  # noqa: F401
    REINFORCE,
    arguments,
    checkpoint,
    figures,
    make_trainer,
    same,
    tiny_backbone,
)

from argparser import parse_args
from dataloaders import build_dataset
from train import choose_device
from utils.data import train_loader
from utils.ranks import Ranks, ranks_of_environment

pytestmark = pytest.mark.usefixtures("tiny_backbone")

# Each process rounds the number of high blocks up for itself: without that, all draw as one does.
POLICIES = {
    "disabled": [],
    "middle": [*REINFORCE, "--segblocks-policy", "middle"],
    "random": [*REINFORCE, "--segblocks-policy", "random"],
    "reinforce": [*REINFORCE, "--segblocks-quantize-percentage", "0"],
    "refined": [
        *REINFORCE,
        *"--segblocks-quantize-percentage 0 --segblocks-reward balanced --epochs 2".split(),
        *"--segblocks-refine-epochs 1 --segblocks-calibrate val".split(),
    ],
}
ON_CUDA = ["--device", "cuda", "--deterministic", "yes"]
SETTING = (
    "--synthetic-train-images 9 --synthetic-val-images 3 --batch-size 4 --lr 0.05 --log-every 1 "
    "--num-viz-images 3 --crop-res 128"
).split()


def job(folder, *flags, **options):
    """-> the experiment's folder, after a run that must succeed."""
    argv = arguments(folder, *SETTING, *flags)
    assert set(run_job(argv, **options)) == {0}
    return folder / "default"


@pytest.mark.parametrize(
    ("policy", "flags"),
    [
        ("disabled", ["--loss", "bootstrap_ce"]),
        ("middle", ["--accumulate", "2", "--grad-clip", "1"]),
        ("random", []),
        ("reinforce", []),
        ("refined", []),
    ],
)
def test_an_epoch_on_two_ranks_equals_one_on_one(tmp_path, policy, flags):
    compare(tmp_path, [*POLICIES[policy], *flags])


def test_a_rank_that_is_lost_costs_no_epoch(tmp_path):
    """It is lost in the first step of the second epoch; the other one ends, and does not wait."""
    argv = arguments(tmp_path, *SETTING, "--epochs", "2", "--val-every", "0")
    lost, other = 1, 0
    exits = run_job(argv, count=2, kill=Kill(step=2, rank=lost))
    assert exits[lost] == -signal.SIGKILL
    assert exits[other] > 0
    progress = checkpoint(tmp_path / "default")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 0)


def compare(tmp_path, flags, **options):
    """An epoch on one rank with one on two."""
    alone, both = (job(tmp_path / str(n), *flags, count=n, sgd=True, **options) for n in (1, 2))
    one, two = checkpoint(alone), checkpoint(both)
    start = make_trainer(tmp_path, *SETTING, *flags).model.state_dict()
    # Rounding grows from step to step.
    rtol, atol = (1e-3, 1e-4) if one["progress"]["epoch"] == 1 else (1e-2, 1e-3)
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=rtol, atol=atol, msg=name)
    weights = one["state_dict"].items()
    moved = [not torch.equal(value.cpu(), start[name].cpu()) for name, value in weights]
    assert sum(moved) > 0.9 * len(moved)
    assert two["progress"]["score_best"] == pytest.approx(one["progress"]["score_best"], abs=1e-3)
    assert same(one["rng"], two["rng"])
    losses = [_logged(folder) for folder in (alone, both)]
    assert len(losses[0]) >= 1
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("policy", POLICIES)
def test_an_epoch_on_two_gpus_equals_one_on_one(tmp_path, policy):
    compare(tmp_path, [*POLICIES[policy], *ON_CUDA])


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["yes", "no"])
@pytest.mark.parametrize("policy", ["disabled", "reinforce"])
@pytest.mark.parametrize("peers", [False, True])
def test_an_epoch_on_two_nodes_equals_one_on_one(tmp_path, policy, graphs, peers):
    flags = [*POLICIES[policy], *ON_CUDA, "--cuda-graphs", graphs]
    compare(tmp_path, flags, nodes=True, peers=peers)
    way = "in memory of the GPUs" if peers else "over NCCL"
    assert f"batch norm is exchanged {way}\n" in (tmp_path / "2/default/run.log").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("peers", [False, True])
def test_processes_train_from_graphs_of_different_numbers_of_blocks(tmp_path, peers):
    """Rounded up, each for itself, so that one process captures what another one replays."""
    flags = [*REINFORCE, "--segblocks-quantize-percentage", "0.25", *ON_CUDA, "--epochs", "6"]
    together = {"nodes": True, "peers": peers}
    found = [
        job(tmp_path / graphs, *flags, "--cuda-graphs", graphs, count=2, sgd=True, **together)
        for graphs in ("yes", "no")
    ]
    weights = [checkpoint(folder)["state_dict"] for folder in found]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-2, atol=1e-3, msg=name)


def _logged(folder):
    """Total loss and share of every logged step, in the log, which the main rank alone writes."""
    log = (folder / "run.log").read_text()
    assert log.count("command: ") == 1
    return [
        float(part.rpartition(" ")[2])
        for line in log.splitlines()
        for part in line.partition(";")[0].split(", ")
        if part.startswith(("loss_total ", "share "))
    ]


def test_validation_on_two_ranks_is_that_of_one(tmp_path):
    flags = [*POLICIES["random"], "--viz", "pred", "--policy-metrics", "yes"]
    folder = job(tmp_path, *flags)
    found = []
    for count in (1, 2):
        assert set(run_job(arguments(tmp_path, *SETTING, *flags, "--mode", "val"), count)) == {0}
        found.append(figures(folder, "val.json"))
        pictures = sorted(folder.glob("viz/pred/*.png"))
        assert len(pictures) == 3
        for picture in pictures:
            picture.unlink()
    for values in found:
        values.pop("command")
    assert found[0] == found[1]
    assert found[0]["images"] == 3


# ---- what cannot work ----


@pytest.fixture
def data():
    return build_dataset("synthetic", "train", height=32, width=32, length=9)


def test_ranks_share_a_batch_evenly(tmp_path, data):
    args = parse_args(arguments(tmp_path, "--batch-size", "4"))
    sizes = [train_loader(data, args, Ranks(r, 2)).batch_size for r in range(2)]
    assert sizes == [2, 2]
    with pytest.raises(ValueError, match=r"--batch-size 4 is that of all 3 processes.*multiple of"):
        train_loader(data, args, Ranks(0, 3))


def test_half_a_torchrun_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but RANK.* not set.*torchrun"):
        ranks_of_environment()


def test_devices_of_ranks(monkeypatch):
    assert choose_device("cpu", Ranks(1, 2, 1, 2)).type == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes on this node, but PyTorch sees 1 CUDA"):
        choose_device("cuda", Ranks(1, 2, 1, 2))
    with pytest.raises(ValueError, match="with several processes give cuda"):
        choose_device("cuda:0", Ranks(1, 2, 1, 2))


def test_speed_mode_refuses_several_processes(tmp_path):
    assert run_job(arguments(tmp_path, "--mode", "speed"), 2) == [1, 1]


def test_an_error_of_one_rank_ends_all(tmp_path):
    """A loss that is not finite on one rank: all of them stop, with status 1."""
    argv = arguments(tmp_path, *SETTING, "--lr", "1e30", "--epochs", "2")
    assert run_job(argv, 2, sgd=True) == [1, 1]
    assert "the loss is " in (tmp_path / "default" / "run.log").read_text()
