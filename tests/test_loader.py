"""Loaders that repeat: any number of workers, ranks, or restarts gives the same batches."""

import pickle

import pytest
import torch

from dataloaders import (
    ResumableSampler,
    build_dataset,
    build_loader,
    start_workers,
    stop_workers,
    train_transform,
    val_transform,
)
from dataloaders.loader import _collate


def _train_data(length: int = 11, seed: int = 3):
    transform = train_transform(64, 32, jitter=0.3, rotate=10)
    return build_dataset(
        "synthetic", "train", transform=transform, seed=seed, height=48, width=64, length=length
    )


def _epochs(workers: int, epochs: range, start: int = 0, **options) -> list[list[torch.Tensor]]:
    loader = build_loader(_train_data(), 2, train=True, num_workers=workers, seed=5, **options)
    batches = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch, start if epoch == epochs[0] else 0)
        batches += list(loader)
    return batches


def _equal(one: list, other: list) -> bool:
    return len(one) == len(other) > 0 and all(
        torch.equal(a, b) for x, y in zip(one, other) for a, b in zip(x, y)
    )


def test_batches_have_the_promised_form():
    images, labels, indices = _epochs(0, range(1))[0]
    assert (images.shape, images.dtype) == ((2, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((2, 32, 32), torch.int64)
    assert (indices.shape, indices.dtype) == ((2,), torch.int64)


def test_batches_do_not_depend_on_the_number_of_workers():
    alone = _epochs(0, range(2))
    assert len(alone) == 10  # 11 images in batches of 2, the last one dropped, twice
    assert _equal(alone, _epochs(2, range(2)))
    assert not _equal(alone[:5], alone[5:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_batches_do_not_depend_on_eight_workers():
    assert _equal(_epochs(0, range(3)), _epochs(8, range(3)))


def test_augmentation_changes_with_epoch_and_seed_only():
    data = _train_data()
    assert all(torch.equal(a, b) for a, b in zip(data.sample(4, 2), data.sample(4, 2)))
    assert all(torch.equal(a, b) for a, b in zip(data[4], data.sample(4, 0)))
    assert not torch.equal(data.sample(4, 0)[0], data.sample(4, 1)[0])
    assert not torch.equal(data.sample(4, 0)[0], _train_data(seed=4).sample(4, 0)[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(workers):
    torch.manual_seed(9)
    before = torch.get_rng_state()
    _epochs(workers, range(1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_the_middle_of_an_epoch(workers):
    whole = _epochs(workers, range(2))
    assert _equal(whole[3:], _epochs(workers, range(2), start=6))


@pytest.mark.parametrize("interleaved", [False, True])
def test_images_of_bytes_lie_in_a_batch_as_they_do_alone(interleaved):
    samples = [torch.randint(0, 256, (4, 6, 3), dtype=torch.uint8) for _ in range(2)]
    samples = [x.permute(2, 0, 1) if interleaved else x.reshape(3, 4, 6) for x in samples]
    images, *_ = _collate([(x, torch.zeros(4, 6), i) for i, x in enumerate(samples)])
    assert images.is_contiguous(memory_format=torch.channels_last) == interleaved
    assert all(torch.equal(a, b) for a, b in zip(images, samples))


def test_indices_and_validation_order():
    data = build_dataset(
        "synthetic", "val", transform=val_transform(), height=32, width=32, length=5
    )
    loader = build_loader(data, 2, train=False)
    assert torch.cat([batch[2] for batch in loader]).tolist() == [0, 1, 2, 3, 4]
    assert len(loader) == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 7, 12])
def test_validation_counts_every_sample_once_over_all_ranks(size, world_size):
    ranks = [ResumableSampler(size, False, 0, r, world_size) for r in range(world_size)]
    assert sorted(key.index for rank in ranks for key in rank) == list(range(size))
    assert all(len(rank) == len(list(rank)) for rank in ranks)


def test_ranks_share_each_global_batch():
    """Two ranks of batch 2 see together what one rank of batch 4 sees, step by step."""
    alone = ResumableSampler(19, True, seed=1)
    ranks = [ResumableSampler(19, True, 1, r, 2) for r in range(2)]
    for epoch in range(3):
        for sampler in (alone, *ranks):
            sampler.set_epoch(epoch)
        order, (first, second) = [k.index for k in alone], [[k.index for k in r] for r in ranks]
        assert sorted(order) == list(range(19))
        assert len(first) == len(second) == 9 == len(ranks[0])
        for step in range(4):
            part = slice(2 * step, 2 * step + 2)
            assert {*first[part], *second[part]} == {*order[4 * step : 4 * step + 4]}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_begin_early_load_nothing_before_they_are_asked(workers):
    data = _train_data(5)
    loaded, sample = torch.zeros(5).share_memory_(), data.sample

    def counted(index, *given):
        loaded[index] += 1
        return sample(index, *given)

    data.sample = counted
    loader = build_loader(data, 2, train=False, num_workers=workers)
    start_workers(loader)
    assert torch.cat([batch[2] for batch in loader]).tolist() == [0, 1, 2, 3, 4]
    assert loaded.tolist() == [1] * 5
    stop_workers(loader)


def test_sampler_start_continues_the_same_order():
    whole, part = ResumableSampler(10, True, 2, 1, 2), ResumableSampler(10, True, 2, 1, 2)
    whole.set_epoch(4)
    part.set_epoch(4, start=6)
    assert list(whole)[3:] == list(part)
    assert len(part) == 2
    part.set_epoch(5)
    assert len(part) == 5
    part.set_epoch(5, epochs=0)
    assert len(part) == len(list(part)) == 0


@pytest.mark.parametrize("start", [0, 6])
def test_several_epochs_in_a_row_are_the_same_as_one_after_another(start):
    """With steps of 6 samples, 19 images make 3 steps: an epoch ends where its last one does."""
    stream, single = (ResumableSampler(19, True, 1, 1, 2, step=6) for _ in range(2))
    stream.set_epoch(2, start, epochs=3)
    keys = list(stream)
    assert len(stream) == len(keys) == (18 - start) // 2 + 9 + 9
    for epoch in (2, 3, 4):
        single.set_epoch(epoch, start if epoch == 2 else 0)
        expected, keys = list(single), keys[len(single) :]
        assert len(expected) == len(single)
        assert {key.epoch for key in expected} == {epoch}
    assert keys == []


@pytest.mark.parametrize("step", [0, 3])
def test_sampler_refuses_a_step_that_does_not_divide_among_ranks(step):
    with pytest.raises(ValueError, match=f"a step of {step} samples: give a multiple of 2"):
        ResumableSampler(10, True, world_size=2, step=step)


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_images_are_loaded_once_and_are_the_same(workers):
    plain = _epochs(workers, range(2))
    data = _train_data()
    data.keep_decoded()
    loader = build_loader(data, 2, train=True, num_workers=workers, seed=5)
    kept = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        kept += list(loader)
    assert _equal(plain, kept)
    seen = {int(i) for batch in kept for i in batch[2]}
    assert len(seen) >= 10
    data.load = None  # not asked again, though other processes asked it
    for index in seen:
        data.sample(index, 7)


def test_images_of_another_size_are_loaded_every_time():
    data = _train_data()
    data.keep_decoded()
    other = build_dataset("synthetic", "train", height=64, width=64, length=11)
    calls = []

    def load(index):
        calls.append(index)
        return other.load(index)

    data.load = load
    for _ in range(2):
        assert torch.equal(data.decoded.get(3, data.load)[0], other.load(3)[0])
    assert calls == [3, 3]


def test_kept_images_sent_to_another_process_start_empty():
    data = _train_data()
    data.keep_decoded()
    data.sample(3)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.sample(3)[0], data.sample(3)[0])
    assert copy.decoded is not data.decoded


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -2), (0, 12), (0, 3)])
def test_sampler_refuses_a_start_outside_the_epoch(epoch, start):
    with pytest.raises(ValueError, match=f"cannot start epoch {epoch} at sample {start}"):
        ResumableSampler(10, True, world_size=2).set_epoch(epoch, start)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_sampler_refuses_an_impossible_rank(rank, world_size):
    with pytest.raises(ValueError, match="give 0 <= rank < world_size"):
        ResumableSampler(10, True, 0, rank, world_size)


@pytest.mark.gpu
def test_loading_leaves_the_gpu_generator_alone():
    torch.cuda.manual_seed(1)
    before = torch.cuda.get_rng_state()
    batches = _epochs(0, range(1))
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert batches[0][0].is_pinned()


def test_training_needs_a_full_batch():
    data = build_dataset("synthetic", "train", length=3, height=32, width=32)
    with pytest.raises(ValueError, match="3 images, fewer than one training batch of 4; use a sm"):
        build_loader(data, 4, train=True)
    with pytest.raises(ValueError, match="batch of 2 on each of 2 ranks"):
        build_loader(data, 2, train=True, world_size=2)
    with pytest.raises(ValueError, match="batch size is 0"):
        build_loader(data, 0, train=False)
