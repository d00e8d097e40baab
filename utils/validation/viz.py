"""Pictures: labels in colour, where the policy looks, all side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms.v2.functional import to_pil_image

from dataloaders import DatasetInfo, denormalise
from utils.errors import user_errors

HIGH_EDGE = (255, 210, 0)  # yellow outline of full-resolution blocks
VOID = (0, 0, 0)
TILE_WIDTH = 512  # pixels at most: TensorBoard gets some of these at every validation


def pictures(
    image: torch.Tensor,
    prediction: torch.Tensor,
    label: torch.Tensor,
    grid: torch.Tensor,
    info: DatasetInfo,
    block_size: int,
) -> dict[str, torch.Tensor]:
    """Every picture of one validated image, uint8 (3,H,W) each: image, pred, label, policy.

    `image` (3,H,W) normalised, `prediction` and `label` (H,W) class ids, `grid` (Gh,Gw) bool.
    """
    plain = denormalise(image.float())
    return {
        "image": plain,
        "pred": colour_labels(prediction, info.colours),
        "label": colour_labels(label, info.colours),
        "policy": overlay_grid(plain, grid, block_size),
    }


def colour_labels(label: torch.Tensor, colours: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Class indices (H,W) -> uint8 (3,H,W); whatever is no class is black."""
    table = torch.tensor([*colours, VOID], dtype=torch.uint8, device=label.device)
    known = torch.where((label >= 0) & (label < len(colours)), label, len(colours))
    return table[known.long()].permute(2, 0, 1)


def overlay_grid(picture: torch.Tensor, grid: torch.Tensor, block_size: int) -> torch.Tensor:
    """Outline high blocks in yellow, darken low ones.

    `picture` uint8 (3,H,W), `grid` bool (Gh,Gw) -> uint8 (3,H,W).
    """
    _, height, width = picture.shape
    high = _to_pixels(grid, block_size)[:height, :width]  # H,W
    out = torch.where(high, picture, (picture.float() * 0.45).to(torch.uint8))
    thickness = max(1, block_size // 32)
    offset_y = torch.arange(height, device=picture.device)[:, None] % block_size
    offset_x = torch.arange(width, device=picture.device)[None, :] % block_size
    edge = (offset_y < thickness) | (offset_y >= block_size - thickness)
    edge = edge | (offset_x < thickness) | (offset_x >= block_size - thickness)
    colour = torch.tensor(HIGH_EDGE, dtype=torch.uint8, device=picture.device)[:, None, None]
    return torch.where(edge & high, colour, out)


def side_by_side(pictures: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pictures uint8 (3,H,W) of one size, two abreast in one (3, rows·h, 2·w) of moderate size."""
    every = -(-pictures[0].shape[-1] // TILE_WIDTH)
    pictures = [picture[:, ::every, ::every] for picture in pictures]
    rows = [torch.cat(pictures[i : i + 2], dim=2) for i in range(0, len(pictures), 2)]
    return torch.cat(rows, dim=1)


def save_picture(path: Path, picture: torch.Tensor) -> None:
    """Write a PNG, making its folder. Raises UserError where that is impossible."""
    with user_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(picture).save(path)


def _to_pixels(grid: torch.Tensor, block_size: int) -> torch.Tensor:
    """(Gh,Gw) -> (Gh·block, Gw·block)."""
    return grid.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
