"""Runs the same function by the package and by its definition, and compares what comes out."""

import torch
from definition import SlowBlocks, slow_blocks
from torch import Tensor

from segblocks import DualResTensor, ops, to_blocks

TOLERANCE = 1e-10
GRIDS = ("none", "one", "mixed", "all")


def make_grid(kind: str, shape: tuple[int, int, int] = (2, 2, 3), seed: int = 0) -> Tensor:
    """(N, Gh, Gw) bool: none high, one, a random half of them, or all."""
    if kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    if kind == "all":
        return torch.ones(shape, dtype=torch.bool)
    total = shape[0] * shape[1] * shape[2]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    high = 1 if kind == "one" else max(1, total // 2)
    return (order < high).view(shape)


def make_image(
    grid: Tensor, channels: int = 3, block: int = 8, seed: int = 0, dtype=torch.float64
) -> Tensor:
    """(N, C, Gh*block, Gw*block) of random values of both signs."""
    n, gh, gw = grid.shape
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(
        (n, channels, gh * block, gw * block), generator=generator, dtype=torch.float64
    )
    return image.to(dtype)


def distance(a, b) -> float:
    """Largest absolute difference; equal infinities do not count."""
    assert a.shape == b.shape, f"{tuple(a.shape)} and {tuple(b.shape)}"
    if not a.is_floating_point():
        return float((a != b).sum())
    a, b = a.detach(), b.detach()
    return float(torch.where(a == b, torch.zeros_like(a), (a - b).abs()).max())


def stored(blocks) -> list[Tensor]:
    """Every stored block of either implementation, channels first, high ones first."""
    if isinstance(blocks, SlowBlocks):
        high, low = blocks.stored()
    else:
        layout = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 2, 3, 1), "NHW": (0, 1, 2, 3)}[blocks.layout]
        high, low = (list(x.permute(layout)) for x in (blocks.highres, blocks.lowres))
        if blocks.layout == "NHWC":
            high, low = ([x.permute(2, 0, 1) for x in part] for part in (high, low))
        if blocks.layout == "NHW":
            high, low = ([x[0] for x in part] for part in (high, low))
    return [*high, *low]


def assert_rule(
    function,
    kind: str = "mixed",
    channels: int = 4,
    block: int = 8,
    inputs: int = 1,
    tolerance: float = TOLERANCE,
):
    """`function(*blocks)` agrees with the definition: stored pixels, combined image, gradients.

    Also: the result's grid is the input's own, and the input is not changed.
    """
    grid = make_grid(kind)
    images = [make_image(grid, channels, block, seed) for seed in range(inputs)]
    runs = []
    for split in (to_blocks, slow_blocks):
        leaves = [image.clone().requires_grad_() for image in images]
        blocks = [split(leaf, grid) if i == 0 else None for i, leaf in enumerate(leaves)]
        for i in range(1, inputs):
            place = blocks[0].grid if split is to_blocks else grid
            blocks[i] = split(leaves[i], place)
        before = [x.pixels.clone() for x in blocks] if split is to_blocks else []
        torch.manual_seed(1)
        results = _as_list(function(*blocks))
        for x, pixels in zip(blocks, before):
            assert torch.equal(x.pixels, pixels), "the input was changed"
            assert all(result.grid is x.grid for result in results)
        runs.append((leaves, results))
    (_, results), (_, slow_results) = runs
    assert len(results) == len(slow_results) > 0
    for result, slow in zip(results, slow_results):
        assert isinstance(result, DualResTensor)
        assert tuple(result.shape) == tuple(slow.shape)
        for mine, theirs in zip(stored(result), stored(slow), strict=True):
            assert distance(mine, theirs) < tolerance
        assert distance(result.combine(), slow.combine()) < tolerance
    gradients = [_gradients(*run) for run in runs]
    if gradients[0] is not None:
        for mine, theirs in zip(*gradients, strict=True):
            assert distance(mine, theirs) < tolerance


def _gradients(leaves, results):
    outputs = [r.combine() for r in results if r.dtype.is_floating_point]
    outputs = [x for x in outputs if x.requires_grad]
    if not outputs:
        return None
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    total = sum((x * w).nan_to_num(posinf=0, neginf=0).sum() for x, w in zip(outputs, weights))
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]


def _as_list(value) -> list:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def place(kind="mixed", shape=(2, 2, 3)):
    """slot, cells, n_high as every operation takes them."""
    mask = make_grid(kind, shape)
    return (*ops.build_slots(mask), int(mask.sum())), mask


def buffer(mask, channels, block, dtype=torch.float64, seed=0):
    """Random pixels (P, C) and the two pictures that they stand for."""
    image = make_image(mask, channels, block, seed)
    slow = slow_blocks(image, mask)
    return pixels_of(slow).to(dtype), slow


def pixels_of(slow):
    """(P, C) of the definition's stored blocks, high ones first."""
    high, low = slow.stored()
    return torch.cat([x.permute(1, 2, 0).flatten(0, 1) for x in (*high, *low)])
