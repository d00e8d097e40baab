"""Losses against plain loops, and at the edges: ignored pixels, few pixels, no pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argparser import parse_args
from dataloaders.info import CAMVID
from utils.class_weights import class_weights
from utils.losses import (
    BootstrappedCrossEntropy,
    CrossEntropy,
    OhemCrossEntropy,
    build_loss,
    task_loss,
)

IGNORED = 255
CLASSES = 5
LOSSES = ["crossentropy", "bootstrap_ce", "ohem"]
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 7.0])


def batch(n: int = 3, size: int = 24, ignored: float = 0.3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, CLASSES, size // 4, size // 4, generator=generator, dtype=dtype)
    target = torch.randint(CLASSES, (n, size, size), generator=generator)
    target[torch.rand(n, size, size, generator=generator) < ignored] = IGNORED
    return logits.requires_grad_(), target


def pixel_losses(logits: Tensor, target: Tensor) -> list[Tensor]:
    """Losses of the valid pixels of each image, by the definition of cross-entropy."""
    logits = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    log_probs = logits - logits.logsumexp(1, keepdim=True)
    return [
        -scores[:, labels != IGNORED].gather(0, labels[labels != IGNORED][None]).flatten()
        for scores, labels in zip(log_probs, target)
    ]


def hardest_mean(losses: Tensor, k: int, threshold: float) -> Tensor:
    ranked = losses.sort(descending=True).values
    if len(ranked) >= k and ranked[k - 1] > threshold:
        return ranked[ranked > threshold].mean()
    return ranked[:k].mean()


def test_cross_entropy_is_the_mean_over_valid_pixels():
    logits, target = batch()
    loss, loss_map = CrossEntropy(IGNORED)(logits, target)
    expected = torch.cat(pixel_losses(logits, target))
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(loss_map[target != IGNORED], expected.detach())


@pytest.mark.parametrize("k", [1, 40, 10_000])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0, 50.0])
def test_bootstrapped_cross_entropy_is_its_definition(k, threshold):
    logits, target = batch()
    target[1, 2:] = IGNORED  # few valid pixels
    loss, _ = BootstrappedCrossEntropy(k, threshold, IGNORED)(logits, target)
    losses = pixel_losses(logits, target)
    assert 0 < len(losses[1]) < 40
    expected = torch.stack([hardest_mean(values, k, threshold) for values in losses]).mean()
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)


def test_published_settings_of_the_bootstrapped_loss():
    loss = build_loss("bootstrap_ce")
    assert (loss.k, loss.threshold, loss.ignore_index) == (4096, 0.3, 255)


@pytest.mark.parametrize("name", LOSSES)
def test_map_is_zero_at_ignored_pixels_and_carries_no_gradient(name):
    logits, target = batch(dtype=torch.float32)
    loss, loss_map = build_loss(name, ignore_index=IGNORED)(logits, target)
    assert loss.shape == ()
    assert loss.requires_grad
    assert loss_map.shape == target.shape
    assert loss_map.dtype == torch.float32
    assert not loss_map.requires_grad
    assert (loss_map[target == IGNORED] == 0).all()
    assert (loss_map[target != IGNORED] > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_values_under_ignored_pixels_do_not_matter(name):
    logits, target = batch(ignored=0)
    target[:, :, 12:] = IGNORED  # resizing mixes neighbours only, so columns 4 and on are unseen
    changed = logits.detach().clone()
    changed[..., 4:] += 100
    criterion = build_loss(name, ignore_index=IGNORED)
    assert criterion(logits, target)[0] == criterion(changed, target)[0]
    assert not torch.equal(logits, changed)


@pytest.mark.parametrize("name", LOSSES)
def test_all_ignored_batch_gives_zero_with_a_gradient(name):
    logits, target = batch(ignored=1.0)
    loss, loss_map = build_loss(name, ignore_index=IGNORED)(logits, target)
    loss.backward()
    assert loss == 0
    assert (loss_map == 0).all()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_an_all_ignored_image_does_not_dilute_the_others(name):
    logits, target = batch(n=2)
    target[1] = IGNORED
    criterion = build_loss(name, ignore_index=IGNORED)
    torch.testing.assert_close(criterion(logits, target)[0], criterion(logits[:1], target[:1])[0])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened(name, dtype):
    logits, target = batch()
    logits = logits.to(dtype)
    criterion = build_loss(name, ignore_index=IGNORED)
    loss, loss_map = criterion(logits, target)
    assert loss.dtype == loss_map.dtype == torch.float32
    assert loss == criterion(logits.float(), target)[0]


def test_unknown_loss_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown loss 'dice'.*crossentropy.*bootstrap_ce"):
        build_loss("dice")


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (BootstrappedCrossEntropy, {"k": 0}),
        (BootstrappedCrossEntropy, {"threshold": -1.0}),
        (OhemCrossEntropy, {"min_kept": 0}),
        (OhemCrossEntropy, {"threshold": 0.0}),
        (OhemCrossEntropy, {"threshold": 1.1}),
    ],
)
def test_impossible_settings_are_errors(loss, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        loss(**options)


@pytest.mark.parametrize("label", [CLASSES, -1, 254])
def test_label_outside_the_classes_is_an_error(label):
    logits, target = batch()
    target[0, 3, 4] = label
    with pytest.raises(ValueError, match=rf"label id {label} with logits of {CLASSES} classes"):
        build_loss("crossentropy")(logits, target)


def test_shapes_and_dtypes_that_do_not_fit_are_errors():
    logits, target = batch()
    criterion = build_loss("crossentropy")
    for wrong in (target[0], target[:2], target[:, None]):
        with pytest.raises(ValueError, match="do not fit"):
            criterion(logits, wrong)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        criterion(logits, target.to(torch.uint8))


# ---- online hard example mining ----


def ohem_by_sorting(losses: Tensor, threshold: float, kept: int) -> Tensor:
    """By the definition, on probabilities: a few lines, one pixel after the other."""
    probabilities = sorted((-losses).exp().tolist())
    hard = sum(p < threshold for p in probabilities)
    return losses.sort(descending=True).values[: max(hard, kept)].mean()


@pytest.mark.parametrize("min_kept", [1, 100, 10_000])
@pytest.mark.parametrize("threshold", [1e-9, 0.3, 0.7, 1.0])
def test_ohem_is_its_definition(min_kept, threshold):
    logits, target = batch()
    target[1, 2:] = IGNORED  # few valid pixels: what is kept is counted over the batch
    loss, loss_map = OhemCrossEntropy(threshold, min_kept, IGNORED)(logits, target)
    losses = torch.cat(pixel_losses(logits, target))
    expected = ohem_by_sorting(losses, threshold, 3 * min_kept)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(loss_map[target != IGNORED], losses.detach())  # of every pixel


def test_ohem_leaves_easy_pixels_alone():
    logits = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    logits[0, 0] = torch.tensor([9.0, 5.0, 0.1, -3.0])  # probabilities of class 0: the last two low
    logits.requires_grad_()
    loss, _ = OhemCrossEntropy(0.7, 1)(logits, torch.zeros(1, 1, 4, dtype=torch.int64))
    loss.backward()
    assert (logits.grad[0, 0, 0, :2] == 0).all()
    assert (logits.grad[0, 0, 0, 2:] < 0).all()
    expected = [math.log(1 + math.exp(-x)) for x in (0.1, -3.0)]
    assert loss.item() == pytest.approx(sum(expected) / 2)


# ---- class weights ----


def test_weighted_cross_entropy_is_that_of_torch():
    logits, target = batch()
    loss, _ = CrossEntropy(IGNORED, WEIGHTS)(logits, target)
    resized = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
    expected = F.cross_entropy(resized, target, WEIGHTS.double(), ignore_index=IGNORED)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_weights_change_nothing(name):
    logits, target = batch()
    plain = build_loss(name, IGNORED)(logits, target)
    weighted = build_loss(name, IGNORED, torch.full((CLASSES,), 3.0))(logits, target)
    torch.testing.assert_close(weighted, plain)


@pytest.mark.parametrize("name", ["bootstrap_ce", "ohem"])
def test_weights_act_on_the_pixels_that_are_kept(name):
    logits, target = batch(n=1)
    few = {"bootstrap_ce": {"k": 50, "threshold": 9}, "ohem": {"min_kept": 50, "threshold": 1e-9}}
    loss, _ = build_loss(name, IGNORED, WEIGHTS, **few[name])(logits, target)
    (losses,) = pixel_losses(logits, target)
    hardest = losses.argsort(descending=True)[:50]
    weights = WEIGHTS[target[target != IGNORED]][hardest]
    torch.testing.assert_close(loss, (losses[hardest] * weights).sum() / weights.sum())


@pytest.mark.parametrize("name", LOSSES)
def test_weighted_map_averages_to_the_weighted_cross_entropy(name):
    logits, target = batch()
    loss_map = build_loss(name, IGNORED, WEIGHTS)(logits, target)[1]
    expected = CrossEntropy(IGNORED, WEIGHTS)(logits, target)[0].detach()
    torch.testing.assert_close(loss_map[target != IGNORED].mean(), expected)
    assert (loss_map[target == 2] == 0).all()  # of weight 0
    plain = build_loss(name, IGNORED)(logits, target)[1]
    ratio = loss_map[target == 4] / plain[target == 4]
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))


@pytest.mark.parametrize("name", LOSSES)
def test_batch_of_weightless_classes_has_loss_0_with_a_gradient(name):
    logits, target = batch(ignored=0)
    loss, loss_map = build_loss(name, IGNORED, WEIGHTS)(logits, torch.full_like(target, 2))
    loss.backward()
    assert loss == 0
    assert (loss_map == 0).all()
    assert (logits.grad == 0).all()


class Meeting:
    """Two processes, one after the other: the first round only hears what each has to add."""

    def __init__(self):
        self.heard: list[Tensor] = []

    def __call__(self, count: Tensor) -> Tensor:
        self.heard.append(count)
        return count

    def of_all(self):
        half = len(self.heard) // 2
        sums = [a + b for a, b in zip(self.heard[:half], self.heard[half:])]
        assert sums
        return iter(2 * sums)


@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_processes_add_up_to_that_of_the_batch(name, weight):
    logits, target = batch(n=4)
    target[:2, 5:] = IGNORED  # the processes have unequal numbers of valid pixels
    every = {"ohem": {"threshold": 1.0}}.get(name, {})
    parts = [(logits[:2], target[:2]), (logits[2:], target[2:])]
    meeting = Meeting()
    for part in parts:
        build_loss(name, IGNORED, weight, meeting, **every)(*part)
    sums = meeting.of_all()
    criterion = build_loss(name, IGNORED, weight, lambda count: next(sums), **every)
    losses, maps = zip(*(criterion(*part) for part in parts))
    loss, loss_map = build_loss(name, IGNORED, weight, **every)(logits, target)
    torch.testing.assert_close(sum(losses), loss)
    torch.testing.assert_close(torch.cat(maps), loss_map)


def test_number_of_weights_must_be_that_of_classes():
    logits, target = batch()
    with pytest.raises(ValueError, match="4 class weights for logits of 5 classes"):
        CrossEntropy(IGNORED, WEIGHTS[:4])(logits, target)


def test_weights_from_numbers_and_files(tmp_path):
    names = ("road", "pole", "car")
    assert class_weights(["1", "2.5", "0"], names).tolist() == [1, 2.5, 0]
    file = tmp_path / "weights.json"
    for text in (
        "[1, 2.5, 0]",
        '{"pole": 2.5, "car": 0, "road": 1}',
        '{"dataset": "x", "class_weights": {"pole": 2.5, "car": 0, "road": 1}}',
    ):
        file.write_text(text)
        assert class_weights([str(file)], names).tolist() == [1, 2.5, 0]
    assert class_weights(["2"], ("only",)).tolist() == [2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["1", "2"], "--class-weights gives 2 class weights for 3 classes (road, pole, car)"),
        (["1", "2", "x"], "weight 'x' of car is not a number"),
        (["1", "-2", "1"], "weight '-2' of pole is not a number of at least 0"),
        (["1", "inf", "1"], "weight 'inf' of pole"),
        (["nan", "1", "1"], "weight 'nan' of road"),
        (["0", "0", "0"], "all class weights are 0"),
        ("[1, 2]", "gives 2 class weights for 3 classes"),
        ("[1, null, 2]", "weight None of pole"),
        ("[1, true, 2]", "weight True of pole"),
        ("3", "holds a int, not a list or mapping"),
        ("{", "is not JSON"),
        ('{"road": 1, "pole": 1, "tree": 1}', "for other classes than this data set's (car, tree)"),
    ],
)
def test_weights_that_cannot_be_used(tmp_path, given, words):
    if isinstance(given, str):
        file = tmp_path / "weights.json"
        file.write_text(given)
        given = [str(file)]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        class_weights(given, ("road", "pole", "car"))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"gone\.json is neither a number nor a file"):
        class_weights(["gone.json"], ("road", "pole", "car"))


def test_command_line_sets_the_loss():
    flags = ["--dataset", "synthetic", "--loss", "ohem", "--ohem-threshold", "0.4"]
    flags += ["--ohem-min-kept", "77", "--class-weights", *map(str, range(11))]
    loss = task_loss(parse_args(flags), CAMVID)
    assert (type(loss), loss.threshold, loss.min_kept) == (OhemCrossEntropy, 0.4, 77)
    assert loss.weight.tolist() == list(range(11))
    assert loss.state_dict() == {}  # nothing of it goes into checkpoints
    assert task_loss(parse_args(flags[:4]), CAMVID).weight is None
