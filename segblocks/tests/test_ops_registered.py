"""Every registered operation: gradients, torch.library.opcheck, dtypes, inputs left alone."""

import pytest
import torch
from agreement import GRIDS, buffer, make_grid, make_image, place
from torch.autograd import gradcheck

from segblocks import ops

HALVES = [torch.float32, torch.float16, torch.bfloat16]
PADDINGS = [(False, 0.0), (False, -torch.inf), (False, 2.5), (True, 0.0)]


def operations(kind="mixed", shape=(1, 2, 2), channels=2, block=4, dtype=torch.float64):
    """name → (operation, its floating-point input, the other arguments)."""
    where, mask = place(kind, shape)
    image = make_image(mask, channels, block, dtype=dtype)
    pixels, _ = buffer(mask, channels, block, dtype)
    table = {"split": (torch.ops.segblocks.split.default, image, (*where, block))}
    for legacy in (False, True):
        table[f"combine legacy={legacy}"] = (
            torch.ops.segblocks.combine.default,
            pixels,
            (*where, block, legacy, True),
        )
        table[f"upsample legacy={legacy}"] = (
            torch.ops.segblocks.upsample.default,
            pixels,
            (*where, block, 2, legacy),
        )
    table["combine contiguous"] = (
        torch.ops.segblocks.combine.default,
        pixels,
        (*where, block, False, False),
    )
    table["upsample 3"] = (
        torch.ops.segblocks.upsample.default,
        pixels,
        (*where, block, 3, False),
    )
    for sides in ((1, 1, 1, 1), (2, 0, -1, 3), (5, 5, 5, 5)):
        for replicate, fill in PADDINGS:
            if fill == -torch.inf:
                continue
            table[f"blockpad {sides} replicate={replicate} fill={fill}"] = (
                torch.ops.segblocks.blockpad.default,
                pixels,
                (*where, block, *sides, replicate, fill),
            )
    return table


def backward_operations(kind="mixed"):
    """name → (operation, gradient, the other arguments)."""
    where, mask = place(kind, (1, 2, 2))
    image = make_image(mask, 2, 4)
    pixels, _ = buffer(mask, 2, 4)
    segblocks = torch.ops.segblocks
    enlarged = segblocks.upsample(pixels, *where, 4, 2, False)
    padded = segblocks.blockpad(pixels, *where, 4, 1, 2, 0, 3, False, 0.0)
    table = {}
    for layout in (False, True):
        table[f"split_backward channels_last={layout}"] = (
            segblocks.split_backward.default,
            pixels,
            (*where, 4, layout),
        )
    for flag in (False, True):
        table[f"combine_backward legacy={flag}"] = (
            segblocks.combine_backward.default,
            image,
            (*where, 4, flag),
        )
        table[f"upsample_backward legacy={flag}"] = (
            segblocks.upsample_backward.default,
            enlarged,
            (*where, 4, 2, flag),
        )
        table[f"blockpad_backward replicate={flag}"] = (
            segblocks.blockpad_backward.default,
            padded,
            (*where, 4, 1, 2, 0, 3, flag),
        )
    return table


NAMES = list(operations())
BACKWARD_NAMES = list(backward_operations())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", GRIDS)
def test_gradient(name, kind):
    operation, x, rest = operations(kind, channels=1, block=2)[name]
    leaf = x.clone().requires_grad_()
    assert gradcheck(lambda value: operation(value, *rest), leaf)


def test_gradient_keeps_the_layout_of_the_image():
    where, mask = place()
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = make_image(mask, 3, 4).contiguous(memory_format=layout).requires_grad_()
        ops.split(leaf, *where, 4).sum().backward()
        assert leaf.grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_registration(name, kind):
    """Schema, fake shapes and strides, autograd registration: torch.library.opcheck."""
    operation, x, rest = operations(kind)[name]
    torch.library.opcheck(operation, (x.clone().requires_grad_(), *rest))


@pytest.mark.parametrize("name", BACKWARD_NAMES)
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_registration_of_backward(name, kind):
    operation, x, rest = backward_operations(kind)[name]
    torch.library.opcheck(operation, (x, *rest))


@pytest.mark.parametrize("sides", [(1, 0, 1, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_registration_of_pooling(kind, sides):
    where, mask = place(kind, (1, 2, 2))
    pixels, _ = buffer(mask, 2, 4)
    window = ([3, 3] if any(sides) else [2, 2], 2, [1, 1])
    forward = (pixels, *where, 4, *sides, False, 0.5, *window)
    torch.library.opcheck(torch.ops.segblocks.max_pool.default, forward)
    out, taps = torch.ops.segblocks.max_pool(*forward)
    backward = (out, taps, *where, 4, *sides, False, *window)
    torch.library.opcheck(torch.ops.segblocks.max_pool_backward.default, backward)


@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_registration_of_batch_norm(kind):
    where, mask = place(kind, (1, 2, 2))
    pixels, _ = buffer(mask, 2, 4)
    segblocks, row = torch.ops.segblocks, torch.ones(2, dtype=torch.float64)
    for given in ((row, row, row.clone(), row.clone()), (None,) * 4):
        torch.library.opcheck(segblocks.batch_statistics.default, (pixels, *given, 0.1, 1e-5))
        tables = torch.ones(3, 4, 2, dtype=torch.float64)
        torch.library.opcheck(segblocks.batch_join.default, (tables, 1, *given, 0.1, 1e-5))
    table = segblocks.batch_statistics(pixels, row, row, None, None, 0.1, 1e-5)
    torch.library.opcheck(segblocks.batch_normalise.default, (pixels, table, pixels + 1, True))
    output = segblocks.batch_normalise(pixels, table, None, True)
    for kept, relu in ((output, True), (None, True), (None, False)):
        given = (output, pixels, table)
        torch.library.opcheck(segblocks.batch_gradient_sums.default, (*given, kept, relu))
        sums = segblocks.batch_gradient_sums(*given, kept, relu)
        backward = (*given, sums, kept, relu, relu)
        torch.library.opcheck(segblocks.batch_normalise_backward.default, backward)
    padded = (pixels, table, True, *where, 4, 1, 0, 1, 2)
    torch.library.opcheck(segblocks.blockpad_normalised.default, padded)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (3, 2, 1, 1), (4, 1, 1, 2)])
def test_registration_of_turning_weights(shape):
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = torch.randn(shape).contiguous(memory_format=layout)
        torch.library.opcheck(torch.ops.segblocks.turn_weight.default, (weight,))


@pytest.mark.parametrize("channels", [1, 3])
def test_registration_with_channels_last_images(channels):
    where, mask = place()
    image = make_image(mask, channels, 4).contiguous(memory_format=torch.channels_last)
    leaf = image.requires_grad_()
    torch.library.opcheck(torch.ops.segblocks.split.default, (leaf, *where, 4))
    torch.library.opcheck(
        torch.ops.segblocks.combine_backward.default, (image.detach(), *where, 4, False)
    )


@pytest.mark.parametrize("kind", GRIDS)
def test_registration_of_bookkeeping(kind):
    mask = make_grid(kind)
    torch.library.opcheck(torch.ops.segblocks.build_slots.default, (mask,))
    torch.library.opcheck(torch.ops.segblocks.select_budget.default, (torch.randn(mask.shape), 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", HALVES)
def test_precision(name, dtype):
    """Each output is the float64 result of the same rounded input, rounded once."""
    operation, x, rest = operations(dtype=dtype)[name]
    result = operation(x, *rest)
    assert result.dtype == dtype
    exact = operation(x.double(), *rest)
    # float32 also pays for the rounding of intermediate weights; half sums in float32.
    close = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 2)
    assert torch.allclose(result.double(), exact, rtol=close, atol=close)
    leaf, leaf64 = x.clone().requires_grad_(), x.double().requires_grad_()
    weight = torch.randn_like(result)
    (grad,) = torch.autograd.grad(operation(leaf, *rest), leaf, weight)
    (grad64,) = torch.autograd.grad(operation(leaf64, *rest), leaf64, weight.double())
    assert grad.dtype == dtype
    assert torch.allclose(grad.double(), grad64, rtol=4 * close, atol=4 * close)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_changed(name):
    operation, x, rest = operations()[name]
    tensors = [t for t in (x, *rest) if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    leaf = x.requires_grad_()
    result = operation(leaf, *rest)
    weight = torch.randn_like(result)
    kept = weight.clone()
    torch.autograd.grad(result, leaf, weight)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_bit_for_bit(name):
    operation, x, rest = operations(channels=5)[name]
    leaf = x.requires_grad_()
    weight = torch.randn_like(operation(leaf, *rest))
    runs = []
    for _ in range(2):
        result = operation(leaf, *rest)
        runs.append((result, *torch.autograd.grad(result, leaf, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("kind", GRIDS)
def test_index_arithmetic_is_64_bit(kind):
    """Rows of pixel buffers beyond 2³¹ are computed in int64, whatever the slots are stored in.

    A buffer that large does not fit a test; that the rows are int64 before they are multiplied
    does.
    """
    from segblocks.ops.pictures import full_rows, half_rows

    big = 1 << 16  # a block of 2¹⁶ × 2¹⁶ pixels holds 2³² of them
    (slot, _, n_high), mask = place(kind, (1, 1, 2))
    at = torch.tensor([0])
    last = torch.tensor([big - 1])
    rows = full_rows(slot, n_high, big, at, last, last)
    assert rows.dtype == torch.int64
    expected = big * big - 1 if mask[0, 0, 0] else n_high * big * big + (big // 2) ** 2 - 1
    if slot[0, 0, 0] in (0, -1):
        assert rows.item() == expected
    assert half_rows(slot, n_high, big, at, last // 2, last // 2).dtype == torch.int64
