"""Losses against plain loops, and at the edges: ignored pixels, few pixels, no pixels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.losses import BootstrappedCrossEntropy, CrossEntropy, build_loss

IGNORED = 255
CLASSES = 5
LOSSES = ["crossentropy", "bootstrap_ce"]


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


@pytest.mark.parametrize("options", [{"k": 0}, {"threshold": -1.0}])
def test_impossible_settings_are_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BootstrappedCrossEntropy(**options)


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
