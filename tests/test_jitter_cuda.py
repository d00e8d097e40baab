"""Colour jitter on the device: the workers draw the same, and the kernels compute the same."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny import checkpoint, make_trainer, run, same, tiny_backbone  # noqa: F401
from torchvision import tv_tensors

import dataloaders.jitter
from argparser import parse_args
from dataloaders import build_dataset, build_loader, device_can_jitter, to_network, train_transform
from dataloaders.jitter import NOTHING
from utils.data import build_train_set

ROOT = Path(__file__).parent.parent
SETTINGS = {"res": 64, "crop_res": (40, 32), "rotate": 10}
on_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])


def _data(**options):
    transform = train_transform(**SETTINGS, **options)
    size = {"height": 48, "width": 64, "length": 11}
    return build_dataset("synthetic", "train", transform=transform, seed=3, **size)


def _batches(workers: int, **options) -> list[tuple[torch.Tensor, ...]]:
    loader = build_loader(_data(jitter=0.3, **options), 2, True, workers, seed=5)
    return list(loader)


def test_jitter_later_is_jitter_now():
    """But for the order in which contrast's mean is summed, as the flip comes before it."""
    now, later = _batches(0, as_bytes=True), _batches(0, jitter_later=True)
    assert len(now) == len(later) == 5
    for (image, label, index), (plain, same_label, same_index, changes) in zip(now, later):
        assert plain.dtype == image.dtype == same_label.dtype == torch.uint8
        assert not torch.equal(image, plain)
        assert (changes.shape, changes.dtype) == ((2, 4, 2), torch.float32)
        assert torch.equal(index, same_index)
        expected, found = to_network(image, label), to_network(plain, same_label, changes)
        assert torch.equal(found[1], expected[1])
        assert (found[0] - expected[0]).abs().max() < 1.5 / 255 / 0.17  # a level
        assert ((found[0] - expected[0]).abs() > 1e-4).float().mean() <= 1e-3


def test_later_jitter_does_not_depend_on_the_number_of_workers():
    assert same(_batches(0, jitter_later=True), _batches(2, jitter_later=True))


def test_no_jitter_later_draws_nothing():
    plain, later = _data(jitter=0, as_bytes=True), _data(jitter=0, jitter_later=True)
    for i in range(6):
        *pair, changes = later.sample(i)
        assert same(list(plain.sample(i)), pair)
        assert (changes[:, 0] == NOTHING).all()
        expected, _ = to_network(*(x[None] for x in pair))
        assert torch.equal(to_network(*(x[None] for x in (*pair, changes)))[0], expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_format_is_that_asked_for(channels_last):
    image, label = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(2, 4, 5)
    out, _ = to_network(image, label, channels_last=channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_the_cpu_jitters_in_the_workers(tmp_path, tiny_backbone):  # noqa: F811
    assert not device_can_jitter(torch.device("cpu"))
    trainer = make_trainer(tmp_path)
    assert len(next(iter(trainer.train_loader))) == 3


def test_kernels_that_fail_leave_jitter_to_the_workers(monkeypatch):
    """As where Triton finds no C compiler."""
    kernels = pytest.importorskip("dataloaders.jitter_cuda", reason="needs Triton")

    def fail(*_):
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(kernels, "jitter_and_normalise", fail)
    monkeypatch.setattr(dataloaders.jitter, "torch", _AnyDevice())
    device_can_jitter.cache_clear()
    with pytest.warns(UserWarning, match="stays in the data workers.*Failed to find C compiler$"):
        assert not device_can_jitter(torch.device("cuda"))
    device_can_jitter.cache_clear()


class _AnyDevice:
    """torch, with CUDA tensors that lie on the CPU."""

    def __getattr__(self, name):
        made = getattr(torch, name)
        if name in ("zeros", "ones"):
            return lambda *size, device, **rest: made(*size, **rest)
        return made


def test_without_triton_jitter_stays_in_the_workers(monkeypatch):
    monkeypatch.setitem(sys.modules, "dataloaders.jitter_cuda", None)
    device_can_jitter.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not device_can_jitter(torch.device("cuda"))
    device_can_jitter.cache_clear()


def test_kernels_compute_what_the_workers_do_in_the_interpreter():
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "segblocks")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(ROOT / "tests" / "jitter_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "as on the CPU\n"


# ---- on a GPU ----


@on_cuda
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (384, 512), (401, 399), (1024, 1024)])
def test_kernels_compute_what_the_workers_do(device, size):
    from jitter_cases import alone, check, pictures, together

    for changes in (alone(), together()):
        for part in changes.split(6):  # what all of them take of memory is too much for small GPUs
            check(pictures(len(part), *size), part, device, channels_last=True)


@on_cuda
def test_kernels_take_and_make_any_layout(device):
    from jitter_cases import check_layouts

    check_layouts(device, 131, 200)


@on_cuda
def test_kernels_repeat_to_the_last_bit(device):
    from jitter_cases import pictures, together

    batch = pictures(24, 384, 512).to(device), torch.zeros(24, 1, 1, device=device)
    changes = together().to(device)
    first, _ = to_network(*batch, changes)
    for _ in range(10):
        assert torch.equal(to_network(*batch, changes)[0], first)


@on_cuda
def test_kernels_do_not_wait_for_the_device(device):
    from jitter_cases import pictures, together

    batch = pictures(24, 64, 64).to(device), torch.zeros(24, 1, 1, device=device)
    changes = together().to(device)
    to_network(*batch, changes)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        to_network(*batch, changes, channels_last=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
def test_training_on_cuda_jitters_there_with_any_number_of_workers(tmp_path, device, tiny_backbone):  # noqa: F811
    assert device_can_jitter(torch.device(device))
    flags = ("--device", device, "--deterministic", "yes", "--epochs", "2")
    try:
        runs = [run(tmp_path / n, *flags, "--num-workers", n) for n in ("0", "2")]
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*(checkpoint(folder)["state_dict"] for folder in runs))


@on_cuda
def test_the_device_of_a_run_chooses_who_jitters(device):
    args = parse_args(["--dataset", "synthetic"])
    for where, parts in ((device, 3), ("cpu", 2), (None, 2)):
        dataset = build_train_set(args, where and torch.device(where))
        image = tv_tensors.Image(torch.zeros(3, 64, 128, dtype=torch.uint8))
        label = tv_tensors.Mask(torch.zeros(64, 128, dtype=torch.uint8))
        assert len(dataset.transform(image, label)) == parts
