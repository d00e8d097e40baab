"""What split and combine do to a picture: writes a PNG of it with the grid drawn over.

python examples/picture_split.py                       # draws a picture of its own
python examples/picture_split.py --image street.jpg --share 0.3 --block 64 --out split.png
"""

import argparse

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from segblocks import build_policy, to_blocks
from segblocks.borders import pad_to_blocks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", help="picture to split; by default one is drawn")
    parser.add_argument("--out", default="picture_split.png", help="PNG to write")
    parser.add_argument("--block", type=int, default=64, help="side of a block in pixels, even")
    parser.add_argument("--share", type=float, default=0.3, help="share of high blocks, 0 to 1")
    return parser.parse_args()


def load_image(path: str | None) -> Tensor:
    """(1, 3, H, W) float in 0 to 1; without a path, rings and poles on a plain ground."""
    if path is not None:
        image = Image.open(path).convert("RGB")
        return transforms.pil_to_tensor(image)[None].float() / 255
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(512.0), indexing="ij")
    image = torch.stack((0.3 + y / 600, 0.45 + y / 900, 0.75 - y / 700))
    distance = ((x - 140) ** 2 + (y - 120) ** 2).sqrt()
    rings = (distance < 70) & (distance.long() // 3 % 2 == 0)
    poles = (x > 330) & (x < 460) & (y > 90) & (x.long() % 9 < 2)
    image[:, rings] = torch.tensor([0.9, 0.2, 0.15])[:, None]
    image[:, poles] = torch.tensor([0.1, 0.1, 0.12])[:, None]
    return image[None]


def draw_grid(image: Tensor, grid: Tensor, block: int) -> Tensor:
    """The image (1, 3, H, W) with a yellow frame round each high block."""
    image = image.clone()
    yellow = torch.tensor([1.0, 0.85, 0.1])[:, None, None]
    for y, x in grid[0].nonzero().tolist():
        tile = image[0, :, y * block : (y + 1) * block, x * block : (x + 1) * block]
        for edge in (tile[:, :2], tile[:, -2:], tile[:, :, :2], tile[:, :, -2:]):
            edge[:] = yellow
    return image


def main() -> None:
    options = parse_arguments()
    image = load_image(options.image)
    padded = pad_to_blocks(image, options.block)
    policy = build_policy("heuristic", block_size=options.block)
    grid = policy(padded, budget=options.share).grid

    blocks = to_blocks(padded, grid)
    combined = blocks.combine()

    marked = draw_grid(combined, grid, options.block)[..., : image.shape[2], : image.shape[3]]
    sheet = torch.cat((image, marked), dim=2)[0]  # the picture above, its blocks below
    pixels = (sheet.clamp(0, 1) * 255).round().to(torch.uint8)
    transforms.to_pil_image(pixels).save(options.out)
    kept = blocks.pixels.shape[0] / (padded.shape[2] * padded.shape[3])
    print(f"{grid.sum()} of {grid.numel()} blocks high, {kept:.0%} of the pixels stored")
    print(f"high blocks {tuple(blocks.highres.shape)}, low blocks {tuple(blocks.lowres.shape)}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
