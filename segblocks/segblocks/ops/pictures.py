"""Where the two dense pictures of a block tensor read: H, the full-resolution one, and L.

Nothing dense is built; these functions turn positions in a picture into rows of the pixel buffer.
"""

import torch
from torch import Tensor


def full_rows(slot: Tensor, n_high: int, block: int, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Rows of the pixel buffer that the full-resolution picture reads at (image, y, x)."""
    half = block // 2
    place = slot[image, y // block, x // block].long()
    y, x = y % block, x % block
    high = (place * block + y) * block + x
    low = n_high * block * block + ((-1 - place) * half + y // 2) * half + x // 2
    return torch.where(place >= 0, high, low)


def half_rows(slot: Tensor, n_high: int, block: int, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Rows whose mean the half-resolution picture reads at (image, y, x): (..., 4)."""
    corner = torch.tensor([0, 1], device=slot.device)
    y = (2 * y)[..., None, None] + corner[:, None]
    x = (2 * x)[..., None, None] + corner
    return full_rows(slot, n_high, block, image[..., None, None], y, x).flatten(-2)


def ring(
    slot: Tensor,
    cells: Tensor,
    n_high: int,
    block: int,
    sides: tuple[int, int, int, int],
    shrink: int,
    replicate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The halo of the high blocks (shrink 1) or of the low blocks (shrink 2).

    Args:
        sides: left, right, top, bottom pixels to add, of the blocks' own resolution.
        replicate: clamp positions to the image.

    Returns:
        rows (n, R) int64, or (n, R, 4) for low blocks, whose mean is the halo pixel; inside (n, R)
        bool, False beyond the image; y, x (R,) int64, the halo's places in a padded block.
    """
    left, right, top, bottom = sides
    _, gh, gw = slot.shape
    side = block // shrink
    device = slot.device
    ys = torch.arange(-top, side + bottom, device=device)
    xs = torch.arange(-left, side + right, device=device)
    own = ((ys >= 0) & (ys < side))[:, None] & ((xs >= 0) & (xs < side))[None, :]
    y_place, x_place = (~own).nonzero(as_tuple=True)

    blocks = (cells[:n_high] if shrink == 1 else cells[n_high:]).long()[:, None]  # n,1
    image, cell_y, cell_x = blocks // (gh * gw), blocks // gw % gh, blocks % gw
    y, x = cell_y * side + ys[y_place], cell_x * side + xs[x_place]  # n,R
    height, width = gh * side, gw * side
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    if replicate:
        inside = torch.ones_like(inside)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    rows = (full_rows if shrink == 1 else half_rows)(slot, n_high, block, image, y, x)
    return rows, inside, y_place, x_place
