"""`pixel_cross_entropy` against its definition in float64; the kernels against the reference."""

import pytest
import torch
import torch.nn.functional as F
from kernels import TOLERANCE, random
from torch.autograd import gradcheck

from segblocks import ops
from segblocks.ops import cuda, reference

IGNORED = 255
SIZES = [  # of the logits, of the labels
    ((5, 7), (5, 7)),
    ((5, 7), (10, 14)),
    ((17, 16), (68, 64)),
    ((3, 18), (24, 144)),
    ((1, 1), (4, 4)),
    ((4, 3), (64, 48)),
    ((5, 4), (15, 12)),
    ((5, 7), (13, 11)),
    ((7, 5), (7, 10)),
    ((9, 8), (3, 5)),
    ((8, 6), (4, 3)),
    ((1, 3), (7, 2)),
]
LAYOUTS = ["contiguous", "channels_last", "cropped", "transposed", "broadcast"]
forward = torch.ops.segblocks.pixel_cross_entropy.default
backward = torch.ops.segblocks.pixel_cross_entropy_backward.default
gpu = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]


def on_gpu(test):
    for mark in gpu:
        test = mark(test)
    return test


def in_layout(logits, layout):
    if layout == "channels_last":
        return logits.contiguous(memory_format=torch.channels_last)
    if layout == "cropped":  # neither contiguous nor aligned
        return F.pad(logits, (2, 1, 0, 0, 1, 1))[:, 1:-1, :, 2:-1]
    if layout == "transposed":
        return logits.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "broadcast":
        return logits[:1].expand(logits.shape)
    return logits


def example(classes=5, small=(5, 7), large=(10, 14), batch=2, ignored=0.3, device="cpu"):
    """float64 logits and labels; every class occurs where there are pixels enough."""
    logits = 3 * torch.randn(batch, classes, *small, dtype=torch.float64, device=device)
    target = torch.arange(batch * large[0] * large[1], device=device) % classes
    target = target.view(batch, *large)
    return logits, target.masked_fill(torch.rand(target.shape, device=device) < ignored, IGNORED)


def by_definition(logits, target):
    large = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    valid = target != IGNORED
    own = large.gather(1, target.masked_fill(~valid, 0)[:, None])[:, 0]
    return (large.exp().sum(1).log() - own).masked_fill(~valid, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_values_and_gradient(small, large, layout):
    logits, target = example(5, small, large)
    logits = in_layout(logits, layout)
    expected = by_definition(logits, target)
    losses, log_sums = forward(logits, target, IGNORED)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(ops.pixel_cross_entropy(logits, target), expected)
    assert (log_sums[target == IGNORED] == 0).all()

    weight = torch.randn_like(expected)
    leaf = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(by_definition(leaf, target), leaf, weight)
    for loss in (forward(leaf, target, IGNORED)[0], ops.pixel_cross_entropy(leaf, target)):
        (grad,) = torch.autograd.grad(loss, leaf, weight)
        torch.testing.assert_close(grad, exact)
    out = backward(weight, logits, target, log_sums, IGNORED)
    assert out.stride() == torch.empty_like(logits).stride()


@pytest.mark.parametrize(("small", "large"), [((2, 3), (4, 6)), ((3, 2), (5, 3)), ((2, 2), (2, 2))])
def test_gradient(small, large):
    logits, target = example(3, small, large)
    assert gradcheck(lambda x: forward(x, target, IGNORED)[0], logits.requires_grad_())


def test_all_ignored():
    logits, target = example(ignored=1.0)
    losses, log_sums = forward(logits.requires_grad_(), target, IGNORED)
    assert not losses.any()
    assert not log_sums.any()
    losses.sum().backward()
    assert not logits.grad.any()


def test_another_label_is_ignored():
    logits, target = example()
    changed = target.masked_fill(target == IGNORED, -1)
    losses = forward(logits, target, IGNORED)[0]
    assert torch.equal(forward(logits, changed, -1)[0], losses)
    assert torch.equal(ops.pixel_cross_entropy(logits, changed, ignore_index=-1), losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(dtype):
    logits, target = example()
    leaf = logits.to(dtype).requires_grad_()
    losses = forward(leaf, target, IGNORED)[0]
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.double(), by_definition(leaf.double(), target).detach(), rtol=1e-5, atol=1e-5
    )
    losses.sum().backward()
    assert leaf.grad.dtype == dtype


def test_autocast_leaves_the_dtype_alone():
    logits, target = example()
    half = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.pixel_cross_entropy(half, target)
        by_operation = forward(half, target, IGNORED)[0]
    assert inside.dtype == by_operation.dtype == torch.float32
    assert torch.equal(inside, ops.pixel_cross_entropy(half, target))
    assert torch.equal(inside, by_operation)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("large", [(5, 7), (10, 14), (13, 11)])
def test_registration(large, dtype, layout):
    logits, target = example(5, (5, 7), large)
    logits = in_layout(logits.to(dtype), layout)
    torch.library.opcheck(forward, (logits.clone().requires_grad_(), target, IGNORED))
    losses, log_sums = forward(logits, target, IGNORED)
    arguments = (torch.randn_like(losses), logits, target, log_sums, IGNORED)
    torch.library.opcheck(backward, arguments)


def check_kernels(logits, target, grad, slack=1):
    """The kernels and the reference in float64, on the same inputs; returns the gradient."""
    kept = [t.clone() for t in (logits, target, grad)]
    losses, log_sums = cuda.pixel_cross_entropy(logits, target, IGNORED)
    exact, exact_sums = reference.pixel_cross_entropy(logits.double(), target, IGNORED)
    assert losses.dtype == log_sums.dtype == reference.loss_dtype(logits.dtype)
    out = cuda.pixel_cross_entropy_backward(grad, logits, target, log_sums, IGNORED)
    assert out.dtype == logits.dtype
    assert out.stride() == torch.empty_like(logits).stride()
    exact_out = reference.pixel_cross_entropy_backward(
        grad.double(), logits.double(), target, exact_sums, IGNORED
    )
    tolerances = [TOLERANCE[t.dtype] for t in (losses, log_sums, out)]
    for found, expected, tolerance in zip(
        (losses, log_sums, out), (exact, exact_sums, exact_out), tolerances
    ):
        error = (found.double() - expected).abs().max()
        assert error <= slack * tolerance * max(1.0, float(expected.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(kept, (logits, target, grad)))
    again = cuda.pixel_cross_entropy_backward(grad, logits, target, log_sums, IGNORED)
    assert torch.equal(again, out)
    assert torch.equal(cuda.pixel_cross_entropy(logits, target, IGNORED)[0], losses)
    return out


def weights_like(target, dtype):
    return random(*target.shape, dtype=reference.loss_dtype(dtype))


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_kernels(small, large, layout, dtype):
    logits, target = example(6, small, large, device="cuda")
    check_kernels(in_layout(logits.to(dtype), layout), target, weights_like(target, dtype))


@on_gpu
@pytest.mark.parametrize("classes", [1, 2, 11, 19, 65, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [(33, 47), (66, 94), (132, 188), (264, 376), (101, 203)])
def test_kernels_for_any_number_of_classes(large, dtype, classes):
    logits, target = example(classes, (33, 47), large, batch=3, device="cuda")
    for layout in ("contiguous", "channels_last"):
        check_kernels(in_layout(logits.to(dtype), layout), target, weights_like(target, dtype))


@on_gpu
@pytest.mark.parametrize("large", [(9, 17), (18, 34), (36, 68), (72, 136), (31, 30)])
def test_kernels_with_gradients_and_labels_of_any_layout(large):
    logits, target = example(5, (9, 17), large, device="cuda")
    logits = logits.float()
    wide = torch.stack((target, torch.full_like(target, 77)), 3)[..., 0]
    grad = random(2, large[0], 2 * large[1])[..., ::2]
    check_kernels(logits, wide, grad)
    check_kernels(logits, target, random(1).expand(target.shape))
    check_kernels(logits, target, grad.masked_fill(torch.rand_like(grad) < 0.98, 0))
    assert not check_kernels(logits, torch.full_like(target, IGNORED), grad).any()


@on_gpu
@pytest.mark.parametrize("large", [(9, 17), (36, 68), (31, 30)])
def test_kernels_at_large_logits(large):
    """No overflow, and small losses beside large logits keep their digits."""
    logits, target = example(5, (9, 17), large, device="cuda")
    # A probability is as exact as its logarithm, and these have three digits before the point.
    check_kernels((logits * 100).float(), target, weights_like(target, torch.float32), slack=10)
    logits = 0.1 * logits + 500
    logits[:, 0] += 10
    target.fill_(0)
    exact = by_definition(logits.float().double() - 500, target)  # about 2e-4
    losses = ops.pixel_cross_entropy(logits.float(), target)
    torch.testing.assert_close(losses.double(), exact, rtol=1e-2, atol=0)


@on_gpu
@pytest.mark.parametrize("large", [(9, 17), (36, 68), (31, 30)])
def test_an_id_that_is_no_class_makes_nan(large):
    for wrong in (5, -1, 2**40):
        logits, target = example(5, (9, 17), large, device="cuda")
        target[0, 3, 4] = wrong
        leaf = logits.float().requires_grad_()
        losses = ops.pixel_cross_entropy(leaf, target)
        assert losses.isnan().sum() == 1
        losses.sum().backward()
        assert leaf.grad.isnan().any()
        assert not leaf.grad[1].isnan().any()


@on_gpu
def test_the_operation_on_cuda():
    logits, target = example(device="cuda")
    leaf = logits.bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(forward, (leaf, target, IGNORED))
    loss = torch.compile(ops.pixel_cross_entropy, fullgraph=True)(leaf, target)
    (grad,) = torch.autograd.grad(loss.mean(), leaf)
    exact = ops.pixel_cross_entropy(leaf, target)
    assert torch.equal(loss, exact)
    assert torch.equal(grad, torch.autograd.grad(exact.mean(), leaf)[0])


@on_gpu
@pytest.mark.parametrize("scale", [2, 4])
def test_enlarged_logits_are_not_stored(scale):
    logits, target = example(64, (64, 64), (64 * scale,) * 2, device="cuda")
    leaf = logits.float().requires_grad_()
    ops.pixel_cross_entropy(leaf, target).sum().backward()  # compiles
    leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.pixel_cross_entropy(leaf, target).sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.1 * (4 * leaf.numel() + 8 * target.numel()) + 2**16


@on_gpu
def test_what_does_not_fit_is_an_error():
    logits, target = example(device="cuda")
    with pytest.raises(TypeError, match="no CUDA kernel"):
        ops.pixel_cross_entropy(logits.long(), target)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        ops.pixel_cross_entropy(logits, target.int())
    with pytest.raises(ValueError, match="do not fit"):
        ops.pixel_cross_entropy(logits[:1], target)
    with pytest.raises(ValueError, match="are empty"):
        ops.pixel_cross_entropy(logits[:, :0], target)
    with pytest.raises(ValueError, match="different devices"):
        ops.pixel_cross_entropy(logits, target.cpu())
    assert ops.pixel_cross_entropy(logits[:0], target[:0]).shape == (0, 10, 14)
