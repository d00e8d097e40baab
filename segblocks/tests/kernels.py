"""Inputs for the CUDA kernels, and their comparison with the PyTorch reference.

The reference runs in float64 on the same inputs; an output is compared by its largest error against
the largest value.
"""

import torch
from agreement import make_grid

from segblocks.ops import cuda, reference

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def place_blocks(kind, batch, block, seed=0):
    """slot, cells, n_high, block on the GPU."""
    grid = make_grid(kind, (batch, 2, 3), seed).cuda()
    return (*cuda.build_slots(grid), int(grid.sum()), block)


def random(*size, dtype=torch.float32):
    return torch.randn(*size, device="cuda", dtype=torch.float64).to(dtype)


def buffer(where, channels, dtype, scale=1, sides=(0, 0, 0, 0)):
    """A random pixel buffer of the size that `where` asks for, optionally enlarged or padded."""
    slot, _, n_high, block = where
    wide, tall = sides[0] + sides[1], sides[2] + sides[3]
    high = n_high * (block * scale + tall) * (block * scale + wide)
    low = block // 2 * scale
    low = (slot.numel() - n_high) * (low + tall) * (low + wide)
    return random(high + low, channels, dtype=dtype)


def picture(where, channels, dtype, layout="contiguous"):
    """A random image for `where` in one of the memory layouts that users have."""
    (n, gh, gw), block = where[0].shape, where[3]
    h, w = gh * block, gw * block
    if layout == "cropped":  # neither contiguous nor aligned
        return random(n, channels + 2, h, w + 3, dtype=dtype)[:, 1:-1, :, 2:-1]
    if layout == "transposed":
        return random(n, channels, w, h, dtype=dtype).transpose(2, 3)
    if layout == "broadcast":  # the gradient of a sum
        return random(1, 1, 1, 1, dtype=dtype).expand(n, channels, h, w)
    image = random(n, channels, h, w, dtype=dtype)
    return image.contiguous(memory_format=getattr(torch, f"{layout}_format", torch.channels_last))


def check(name, source, where, *rest):
    """`name` by the kernels and by the reference; returns the kernels' output."""
    before = source.clone()
    out = getattr(cuda, name)(source, *where, *rest)
    expected = getattr(reference, name)(source.double(), *where, *rest)
    assert out.dtype == source.dtype
    assert out.shape == expected.shape
    infinite = expected.isinf()
    assert torch.equal(out.isinf(), infinite)
    error = (out.double() - expected).masked_fill(infinite, 0).abs()
    scale = expected.masked_fill(infinite, 0).abs()
    if out.numel():
        assert error.max() <= TOLERANCE[source.dtype] * max(1.0, float(scale.max()))
    assert torch.equal(source, before), "the input changed"
    return out


def rows_of(where, image, more=0, scale=1):
    """Rows of a pixel buffer, padded by `more` or enlarged, that belong to one image."""
    slot, cells, n_high, block = where
    per_image = slot.shape[1] * slot.shape[2]
    areas = torch.full((cells.shape[0],), (block // 2 * scale + more) ** 2, device="cuda")
    areas[:n_high] = (block * scale + more) ** 2
    starts = areas.cumsum(0) - areas
    mine = (cells // per_image == image).nonzero().flatten()
    return torch.cat([torch.arange(s, s + a) for s, a in zip(starts[mine], areas[mine])]).cuda()
