"""Extended buffers, as the fused convolutions read and write them, to run them on and to check."""

import torch
from fast_models import relative_error

from segblocks import BlockGrid
from segblocks.fast.tables import Scale

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
REPEATS = {"cuda": 5, "cpu": 1}
NAN = float("nan")


def grid_of(shape: tuple[int, int, int], n_high: int, device: str = "cuda") -> BlockGrid:
    """A grid with so many high blocks, anywhere."""
    total = shape[0] * shape[1] * shape[2]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return BlockGrid.from_mask((order < n_high).view(shape).to(device), n_high)


def edges_of(averages: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_high·(b/2)², C) averages as those along a block's edge, and those inside."""
    half = block // 2
    on_edge = torch.ones(half, half, dtype=torch.bool, device=averages.device)
    on_edge[1:-1, 1:-1] = False
    blocks = averages.view(-1, half, half, averages.shape[1])
    return blocks[:, on_edge], blocks[:, ~on_edge]


def quads_of(pixels: torch.Tensor, scale: Scale) -> torch.Tensor:
    """The 2×2 means of the high blocks, in the order of an extended buffer."""
    half, channels = scale.block // 2, pixels.shape[1]
    blocks = pixels[: scale.high_rows].view(-1, half, 2, half, 2, channels)
    return blocks.mean((2, 4)).view(-1, channels)


def extended_input(grid: BlockGrid, scale: Scale, channels: int, dtype) -> torch.Tensor:
    """Random pixels and what follows them; NaN where nothing may be read."""
    x = torch.randn(scale.zero + 1, channels, device=grid.mask.device).to(dtype)
    x[-1] = 0
    averages = quads_of(x.float(), scale).to(dtype)
    if scale.block > 4 and grid.n_high:
        half = scale.block // 2
        averages.view(-1, half, half, channels)[:, 1:-1, 1:-1] = NAN
    x[scale.rows : scale.zero] = averages
    return x


def check_output(out: torch.Tensor, expected: torch.Tensor, scale: Scale) -> None:
    """Pixels, averages along the edges, and the row of zeros; `out` was NaN before."""
    bound = BOUND[out.dtype]
    assert relative_error(out[: scale.rows], expected) < bound
    assert not out[scale.zero].any(), "the row of zeros"
    if scale.high_rows:
        found, _ = edges_of(out[scale.rows : scale.zero], scale.block)
        means, _ = edges_of(quads_of(expected, scale), scale.block)
        assert relative_error(found, means) < bound


def check_equal(results: list[torch.Tensor]) -> None:
    """Every run gives the same bits."""
    bits = [out.view(torch.int16) for out in results]
    assert all(torch.equal(bits[0], other) for other in bits[1:])
