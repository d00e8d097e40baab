"""Batches in memory that workers share with the main process: what DataLoader would hand over."""

import gc
import time
import weakref
from itertools import islice

import pytest
import torch
from tiny import same

from dataloaders import DataError, build_dataset, build_loader, stop_workers, train_transform
from dataloaders.lending import PREFETCH, LendingLoader, _Filled
from utils.training.uploads import Uploads

TRANSFORMS = {
    "float": {"jitter": 0.3},
    "bytes": {"jitter": 0.3, "as_bytes": True},
    "jitter later": {"jitter": 0.3, "jitter_later": True},
}


def data(length: int = 12, **options):
    transform = train_transform(64, 32, **options)
    return build_dataset(
        "synthetic", "train", transform=transform, seed=3, height=48, width=64, length=length
    )


def batches(workers: int, epochs: int = 2, lend: bool = False, **options) -> list[list]:
    loader = build_loader(data(**options), 2, train=True, num_workers=workers, seed=5)
    loader.sampler.set_epoch(0, epochs=epochs)
    found = [[x.clone() for x in b] for b in (loader.lend() if lend else loader)]
    stop_workers(loader)
    return found


@pytest.fixture
def build():
    """`build_loader` for training with batches of two, and an end to the workers."""
    built = []

    def one(dataset, workers, batch_size=2):
        built.append(build_loader(dataset, batch_size, train=True, num_workers=workers, seed=5))
        return built[-1]

    yield one
    for loader in built:
        stop_workers(loader)


@pytest.fixture
def without_cuda(monkeypatch):
    """Lending without pinned memory."""
    monkeypatch.setattr("dataloaders.lending.Slots.pin", lambda self: None)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_what_is_lent_is_what_is_loaded_without_workers(without_cuda, kind, workers):
    expected = batches(0, **TRANSFORMS[kind])
    assert len(expected) == 12
    assert same(batches(workers, lend=True, **TRANSFORMS[kind]), expected)
    assert same(batches(workers, **TRANSFORMS[kind]), expected)


def test_images_of_bytes_stay_interleaved(build, without_cuda):
    loader = build(data(as_bytes=True), 1)
    assert next(loader.lend())[0].is_contiguous(memory_format=torch.channels_last)
    assert next(iter(loader))[0].is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_the_readers_until_the_next_is_asked_for(build, without_cuda):
    expected = batches(0, as_bytes=True)
    loader = build(data(as_bytes=True), 1)
    loader.sampler.set_epoch(0, epochs=2)
    assert loader.prefetch_factor == PREFETCH
    lent = loader.lend()
    for k in range(9):
        batch = next(lent)
        _wait_for(loader, k + PREFETCH, expected)  # all that the worker may make meanwhile
        assert loader._iterator._send_idx == k + 1 + PREFETCH  # or it would make more
        assert same([list(batch)], [expected[k]])


def _wait_for(loader: LendingLoader, k: int, expected: list) -> None:
    """Until the only worker has made batch `k`."""
    made = _Filled(0, k % (PREFETCH + 1), tuple(expected[k][2].tolist()))
    deadline = time.monotonic() + 60
    while not same([list(loader.slots.read(made))], [expected[k]]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_memory_is_used_over_and_over(build, without_cuda):
    loader = build(data(as_bytes=True), 2)
    loader.sampler.set_epoch(0, epochs=5)
    addresses = [batch[0].data_ptr() for batch in loader.lend()]
    assert len(addresses) == 30
    assert len(set(addresses)) == 2 * (PREFETCH + 1)


def test_batches_of_an_ordinary_pass_may_be_kept(build):
    loader = build(data(as_bytes=True), 1)
    loader.sampler.set_epoch(0, epochs=2)
    assert same([list(b) for b in list(loader)], batches(0, as_bytes=True))


def test_a_pass_that_was_left_does_not_show_in_the_next(build, without_cuda):
    loader = build(data(as_bytes=True), 2)
    loader.sampler.set_epoch(1, epochs=2)
    assert len(list(islice(loader.lend(), 3))) == 3
    loader.sampler.set_epoch(0, epochs=2)
    again = [[x.clone() for x in batch] for batch in loader.lend()]
    assert same(again, batches(0, as_bytes=True))


class _Odd:
    """A data set of which some samples are other ones."""

    def __init__(self, odd: set[int], change):
        self.data, self.odd, self.change = data(as_bytes=True), odd, change
        self.info, self.split = self.data.info, self.data.split

    def __len__(self):
        return len(self.data)

    def sample(self, index, epoch=0):
        found = self.data.sample(index, epoch)
        return self.change(*found) if index in self.odd else found


def _damaged(*_):
    raise DataError("no picture")


@pytest.mark.parametrize("odd", [0, 7])
def test_a_damaged_sample_is_told_when_its_turn_comes(build, odd):
    loader = build(_Odd({odd}, _damaged), 1)
    assert isinstance(loader, LendingLoader) == (odd != 0)
    with pytest.raises(DataError, match="no picture"):
        list(loader)


@pytest.mark.parametrize("odd", [0, 7])
def test_samples_of_two_sizes_are_refused(build, odd):
    dataset = _Odd({odd}, lambda image, label: (image[..., 1:], label[..., 1:]))
    with pytest.raises(DataError, match="cannot share a batch"):
        list(build(dataset, 1))


def test_a_tensor_more_than_the_first_sample_has_is_not_lost(build, without_cuda):
    dataset = _Odd(set(), lambda image, label: (image, label, torch.ones(2)))
    loader = build(dataset, 1)
    dataset.odd = set(range(12))
    assert {len(batch) for batch in loader.lend()} == {4}


def test_samples_other_than_the_first_are_handed_over_all_the_same(build, without_cuda):
    """With batches of one, sizes may differ."""
    dataset = _Odd({7}, lambda image, label: (image[..., 1:], label[..., 1:]))
    loader = build(dataset, 1, batch_size=1)
    sizes = [int(image.shape[-1]) for image, *_ in loader.lend()]
    assert sorted(sizes) == [31] + [32] * 11


def test_what_is_lent_is_copied_before_the_next_is_asked_for():
    told, batch = [], [torch.zeros(1), torch.zeros(1), torch.tensor([0])]

    class Copied:
        def synchronize(self):
            told.append("copied")

    def lent():
        for i in range(3):
            told.append(f"asked for {i}")
            yield batch

    uploads = Uploads(lent(), torch.device("cpu"))
    next(uploads)
    uploads._copied = Copied()
    uploads.ahead()
    uploads.ahead()  # it has one
    assert told == ["asked for 0", "copied", "asked for 1"]


class TestOnCuda:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("kind", TRANSFORMS)
    def test_uploads_are_what_is_loaded(self, kind):
        device = torch.device("cuda")
        expected = batches(0, 6, **TRANSFORMS[kind])
        for _ in range(2):  # the second time, memory of the first may have its address
            loader = build_loader(data(**TRANSFORMS[kind]), 2, train=True, num_workers=2, seed=5)
            loader.sampler.set_epoch(0, epochs=6)
            found = []
            for (image, label, *changes), index in Uploads(loader, device):
                assert {x.device.type for x in (image, label, *changes)} == {"cuda"}
                found.append([image.cpu(), label.cpu(), index, *(x.cpu() for x in changes)])
            assert same(found, expected)
            stop_workers(loader)
            gone = weakref.ref(loader.slots)
            del loader
            gc.collect()
            assert gone() is None

    def test_lent_memory_is_pinned_and_let_go(self, build):
        loader = build(data(as_bytes=True), 1)
        batch = next(loader.lend())
        assert batch[0].is_pinned()
        torch.cuda.synchronize()
        unpin = loader.slots._pinned
        loader.slots.pin()  # nothing to do
        assert loader.slots._pinned is unpin
        unpin()
        assert not batch[0].is_pinned()
        torch.cuda.synchronize()

    def test_memory_that_cannot_be_pinned_is_lent_all_the_same(self, build):
        loader = build(data(as_bytes=True), 1)
        loader.sampler.set_epoch(0, epochs=2)
        slots, cudart = loader.slots, torch.cuda.cudart()
        start = slots._memory.data_ptr()
        assert int(cudart.cudaHostRegister(start, slots._memory.nbytes, 0)) == 0
        found = [[x.clone() for x in batch] for batch in loader.lend()]  # registering again fails
        assert slots._pinned is None
        cudart.cudaHostUnregister(start)
        torch.zeros(4, device="cuda").sum().item()
        assert same(found, batches(0, as_bytes=True))
