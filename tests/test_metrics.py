"""Scores against torchmetrics and against counts done by hand."""

import math

import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from utils.validation.metrics import SegmentationMetrics, count_pixels

CLASSES, IGNORED = 7, 255


def batches(n: int = 3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(n):
        target = torch.randint(CLASSES, (2, 16, 20), generator=generator)
        prediction = torch.randint(CLASSES, (2, 16, 20), generator=generator)
        right = torch.rand(2, 16, 20, generator=generator) < 0.1 + 0.12 * target
        target[torch.rand(2, 16, 20, generator=generator) < 0.2] = IGNORED
        yield torch.where(right & (target != IGNORED), target, prediction), target


def scores(*pairs, classes: int = CLASSES) -> dict:
    metrics = SegmentationMetrics(classes)
    for prediction, target in pairs:
        pair = torch.as_tensor(prediction), torch.as_tensor(target)
        metrics.update(count_pixels(*pair, classes, IGNORED))
    return metrics.compute()


def test_agrees_with_torchmetrics():
    pairs = list(batches())
    prediction, target = (torch.cat(parts) for parts in zip(*pairs))
    options = {"num_classes": CLASSES, "ignore_index": IGNORED}
    found = scores(*pairs)
    iou = multiclass_jaccard_index(prediction, target, average="none", **options)
    assert iou.std() > 0.1
    assert list(found["iou"].values()) == pytest.approx(iou.tolist())
    assert found["miou"] == pytest.approx(iou.mean().item())
    for name, average in (("overall_accuracy", "micro"), ("mean_accuracy", "macro")):
        accuracy = multiclass_accuracy(prediction, target, average=average, **options)
        assert found[name] == pytest.approx(accuracy.item())
    labelled = multiclass_confusion_matrix(prediction, target, **options).sum(1)
    weighted = (labelled * iou).sum() / labelled.sum()
    assert found["weighted_accuracy"] == pytest.approx(weighted.item())


def test_counts_by_hand():
    found = scores(([[0, 0, 1, 1, 0]], [[0, 1, 1, 1, IGNORED]]), classes=2)
    assert found["iou"] == {"0": pytest.approx(1 / 2), "1": pytest.approx(2 / 3)}
    assert found["overall_accuracy"] == pytest.approx(3 / 4)
    assert found["mean_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["weighted_accuracy"] == pytest.approx((1 / 2 + 3 * 2 / 3) / 4)


def test_class_without_a_label_is_nan_and_left_out_of_the_mean():
    # Class 2 is predicted once but never labelled; class 3 is neither.
    found = scores(([[0, 0, 1, 2]], [[0, 0, 1, 1]]), classes=4)
    assert math.isnan(found["iou"]["2"])
    assert math.isnan(found["iou"]["3"])
    assert found["iou"]["1"] == pytest.approx(1 / 2)
    assert found["miou"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["mean_accuracy"] == pytest.approx((1 + 1 / 2) / 2)


def test_nothing_labelled_is_nan_throughout():
    found = scores(([[0, 1]], [[IGNORED, IGNORED]]), classes=2)
    values = [*found.pop("iou").values(), *found.values()]
    assert len(values) == 6
    assert all(math.isnan(value) for value in values)


def test_counts_beyond_single_precision():
    metrics = SegmentationMetrics(2)
    metrics.confusion += 2**24
    metrics.update(count_pixels(torch.tensor([[1]]), torch.tensor([[1]]), 2, IGNORED))
    assert metrics.confusion[1, 1] == 2**24 + 1


def test_names_and_reset():
    metrics = SegmentationMetrics(2)
    metrics.update(count_pixels(torch.tensor([[1, 1]]), torch.tensor([[1, 0]]), 2, IGNORED))
    assert list(metrics.compute(["road", "car"])["iou"]) == ["road", "car"]
    assert list(metrics.compute(["a", "b"])["iou"]) == ["a", "b"]
    with pytest.raises(ValueError, match="3 class names for 2 classes"):
        metrics.compute(["a", "b", "c"])
    metrics.reset()
    assert metrics.confusion.sum() == 0


def test_inputs_are_left_as_they_were():
    prediction, target = next(batches(1))
    kept = prediction.clone(), target.clone()
    scores((prediction, target))
    assert torch.equal(prediction, kept[0])
    assert torch.equal(target, kept[1])


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="differ in shape"):
        count_pixels(torch.zeros(1, 2, 2).long(), torch.zeros(1, 4, 4).long(), 2, IGNORED)
    with pytest.raises(ValueError, match="at least one class"):
        SegmentationMetrics(0)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_update_on_the_device_does_not_wait_for_it(deterministic):
    metrics = SegmentationMetrics(CLASSES).cuda()
    pairs = list(batches())
    on_device = [(p.cuda(), t.cuda()) for p, t in pairs]
    metrics.update(count_pixels(*on_device[0], CLASSES, IGNORED))
    metrics.reset()
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pair in on_device:
            metrics.update(count_pixels(*pair, CLASSES, IGNORED))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    found, wanted = metrics.compute(), scores(*pairs)
    assert found.pop("iou") == pytest.approx(wanted.pop("iou"), nan_ok=True)
    assert found == pytest.approx(wanted)
