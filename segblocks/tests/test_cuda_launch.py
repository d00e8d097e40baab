"""How the CUDA kernels are launched: streams, graphs, repeatability, sizes beyond 32 bits."""

import gc

import pytest
import torch
from kernels import buffer, picture, place_blocks, random, rows_of

from segblocks.ops import cuda, reference
from segblocks.ops.cuda import module

pytestmark = pytest.mark.gpu


def operations(where, channels=64, dtype=torch.float16):
    """Every kernel as a call without arguments."""
    pixels, image = buffer(where, channels, dtype), picture(where, channels, dtype)
    last = image.contiguous(memory_format=torch.channels_last)
    sides = (1, 2, 2, 1)
    padded, large = buffer(where, channels, dtype, sides=sides), buffer(where, channels, dtype, 2)
    odd = picture(where, 3, dtype)
    scores = random(*where[0].shape)
    return {
        "split": lambda: cuda.split(last, *where),
        "split tile": lambda: cuda.split(image, *where),
        "split planes": lambda: cuda.split(odd, *where),
        "split_backward": lambda: cuda.split_backward(pixels, *where, True),
        "split_backward tile": lambda: cuda.split_backward(pixels, *where, False),
        "combine": lambda: cuda.combine(pixels, *where, False, True),
        "combine tile": lambda: cuda.combine(pixels, *where, False, False),
        "combine_backward": lambda: cuda.combine_backward(last, *where, False),
        "combine_backward tile": lambda: cuda.combine_backward(image, *where, False),
        "blockpad": lambda: cuda.blockpad(pixels, *where, *sides, False, 0.0),
        "blockpad_backward": lambda: cuda.blockpad_backward(padded, *where, *sides, True),
        "upsample": lambda: cuda.upsample(pixels, *where, 2, False),
        "upsample_backward": lambda: cuda.upsample_backward(large, *where, 2, False),
        "build_slots": lambda: cuda.build_slots(where[0] >= 0)[1],
        "select_budget": lambda: cuda.select_budget(scores, 3),
        "choose_slots": lambda: cuda.choose_slots(scores, 3)[1],
    }


def test_repeats_bit_for_bit():
    for name, call in operations(place_blocks("mixed", 2, 32)).items():
        first = call()
        for _ in range(20):
            assert torch.equal(call(), first), name


def test_runs_on_the_current_stream():
    where = place_blocks("mixed", 2, 32)
    calls = operations(where)
    expected = {name: call() for name, call in calls.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    late = torch.zeros_like(buffer(where, 64, torch.float16))
    value = torch.randn_like(late)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # on the default stream the kernel would not wait for this
        late.copy_(value)
        combined = cuda.combine(late, *where, False, True)
        outputs = {name: call() for name, call in calls.items()}
    stream.synchronize()
    assert torch.equal(combined, cuda.combine(value, *where, False, True))
    for name, out in outputs.items():
        assert torch.equal(out, expected[name]), name


def test_captured_in_a_cuda_graph():
    where = place_blocks("mixed", 1, 16)
    pixels = buffer(where, 16, torch.float16)

    def step():
        padded = cuda.blockpad(pixels, *where, 1, 1, 1, 1, False, 0.0)
        image = cuda.combine(pixels, *where, False, True)
        return padded, image, cuda.split(image, *where)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles and loads, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    pixels.copy_(torch.randn_like(pixels))
    graph.replay()
    for out, expected in zip(captured, step()):
        assert torch.equal(out, expected)


def test_never_waits_for_the_device():
    calls = operations(place_blocks("mixed", 1, 16))
    for call in calls.values():
        call()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls.values():
            call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_new_shapes_compile_nothing():
    for call in operations(place_blocks("mixed", 1, 16)).values():
        call()
    compiled = module._raw_module.cache_info().misses
    for batch, block, channels in ((2, 16, 64), (1, 32, 128), (3, 8, 32)):
        for call in operations(place_blocks("one", batch, block), channels).values():
            call()
    assert module._raw_module.cache_info().misses == compiled


def test_refuses_what_does_not_fit():
    where = place_blocks("mixed", 1, 8)
    pixels = buffer(where, 4, torch.float32)
    with pytest.raises(ValueError, match="pixel buffer must be"):
        cuda.combine(pixels[:-1], *where, False, True)
    with pytest.raises(TypeError, match="no CUDA kernel"):
        cuda.combine(pixels.long(), *where, False, True)
    with pytest.raises(ValueError, match="scale"):
        cuda.upsample(pixels, *where, 1, False)
    with pytest.raises(ValueError, match="crop less"):
        cuda.blockpad(pixels, *where, -3, -3, 0, 0, False, 0.0)
    with pytest.raises(ValueError, match="count must be"):
        cuda.select_budget(random(1, 2, 2), 5)
    with pytest.raises(ValueError, match="count must be 0 to 4"):
        cuda.choose_slots(random(1, 2, 2), 5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_more_than_two_to_the_31_elements(channels_last):
    """Image and pixel buffer above 2^31 elements; the first and the last image are compared."""
    needed = 18 << 30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    n, channels, block, gh, gw = 80, 64, 128, 4, 8
    grid = torch.ones(n, gh, gw, dtype=torch.bool, device="cuda")
    grid[:, 1::2, ::3] = False
    slot, cells = cuda.build_slots(grid)
    where = (slot, cells, int(grid.sum()), block)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (n, channels, gh * block, gw * block)
    image = torch.empty(size, dtype=torch.float16, device="cuda", memory_format=layout)
    for part in image:
        part.copy_(torch.randn(size[1:], dtype=torch.float16, device="cuda"))
    pixels = cuda.split(image, *where)
    assert min(image.numel(), pixels.numel()) > 2**31

    alone = grid[:1]  # images stand alone and share one grid
    small = (*cuda.build_slots(alone), int(alone.sum()), block)

    def compare(out, name, source, *rest, tolerance=1e-2):
        expected = getattr(reference, name)(source.double(), *small, *rest)
        assert (out.double() - expected).abs().max() < tolerance, name

    for i in (0, n - 1):
        rows, padded_rows = rows_of(where, i), rows_of(where, i, 2)
        here = slice(i, i + 1)
        compare(pixels[rows], "split", image[here])
        out = cuda.combine(pixels, *where, False, channels_last)[here].clone()
        compare(out, "combine", pixels[rows], False, channels_last)
        out = cuda.split_backward(pixels, *where, channels_last)[here].clone()
        compare(out, "split_backward", pixels[rows], channels_last)
        out = cuda.combine_backward(image, *where, False)[rows]
        compare(out, "combine_backward", image[here], False)
        padded = cuda.blockpad(pixels, *where, 1, 1, 1, 1, False, 0.0)
        compare(padded[padded_rows], "blockpad", pixels[rows], 1, 1, 1, 1, False, 0.0)
        out = cuda.blockpad_backward(padded, *where, 1, 1, 1, 1, False)[rows]
        sides = (1, 1, 1, 1, False)
        compare(out, "blockpad_backward", padded[padded_rows], *sides, tolerance=2e-2)
        del padded, out
    del image, pixels
    gc.collect()
    torch.cuda.empty_cache()


def test_upsample_above_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    n, channels, block = 21, 128, 64
    grid = torch.ones(n, 8, 8, dtype=torch.bool, device="cuda")
    grid[:, :, ::7] = False
    where = (*cuda.build_slots(grid), int(grid.sum()), block)
    pixels = buffer(where, 1, torch.float16).expand(-1, channels).contiguous()
    large = cuda.upsample(pixels, *where, 2, False)
    assert large.numel() > 2**31
    grad = cuda.upsample_backward(large, *where, 2, False)
    alone = grid[:1]
    small = (*cuda.build_slots(alone), int(alone.sum()), block)
    for i in (0, n - 1):
        rows, large_rows = rows_of(where, i), rows_of(where, i, scale=2)
        expected = reference.upsample(pixels[rows].double(), *small, 2, False)
        assert (large[large_rows].double() - expected).abs().max() < 1e-2
        expected = reference.upsample_backward(large[large_rows].double(), *small, 2, False)
        assert (grad[rows].double() - expected).abs().max() < 4e-2
    del pixels, large, grad
    gc.collect()
    torch.cuda.empty_cache()
