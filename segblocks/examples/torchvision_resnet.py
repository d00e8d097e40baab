"""A torchvision ResNet on blocks, unmodified but for its head: cost and agreement with dense.

python examples/torchvision_resnet.py                          # random weights, on any machine
python examples/torchvision_resnet.py --pretrained --image street.jpg
"""

import argparse

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as transforms

from segblocks import build_policy, execute_with_grid

BLOCK = 128  # a multiple of twice the network's stride of 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", help="picture to run on; by default one is drawn")
    parser.add_argument("--height", type=int, default=256, help="multiple of 128")
    parser.add_argument("--width", type=int, default=512, help="multiple of 128")
    parser.add_argument("--pretrained", action="store_true", help="ImageNet weights (downloads)")
    return parser.parse_args()


def load_image(path: str | None, height: int, width: int) -> Tensor:
    """(1, 3, H, W) normalised; without a path, plain but for texture in the right half."""
    if path is None:
        generator = torch.Generator().manual_seed(0)
        image = torch.full((3, height, width), 0.5)
        texture = 0.2 * torch.randn(3, height, width // 2, generator=generator)
        image[:, :, width // 2 :] += texture
    else:
        image = transforms.pil_to_tensor(Image.open(path).convert("RGB"))
        image = transforms.resize(image, [height, width]).float() / 255
    return transforms.normalize(image, MEAN, STD)[None]


def build_trunk(pretrained: bool) -> nn.Module:
    """A ResNet-18 without its global pooling and classifier: image → (N, 512, H/32, W/32)."""
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1 if pretrained else None
    net = torchvision.models.resnet18(weights=weights).eval()
    return nn.Sequential(*list(net.children())[:-2])


def giga_macs(function, *args) -> tuple[Tensor, float]:
    """The result and its multiply-accumulates in 10⁹, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        result = function(*args)
    return result, counter.get_total_flops() / 2e9


@torch.no_grad()
def main() -> None:
    options = parse_arguments()
    torch.manual_seed(0)
    image = load_image(options.image, options.height, options.width)
    net = build_trunk(options.pretrained)
    policy = build_policy("heuristic", block_size=BLOCK)

    dense, cost = giga_macs(net, image)
    print(f"image {tuple(image.shape)}, blocks of {BLOCK} chosen by the detail they hold")
    print(f"{'high blocks':>12} {'GMACs':>8} {'of dense':>9} {'cosine similarity to dense':>27}")
    print(f"{'dense':>12} {cost:8.2f} {1:9.0%} {1:27.4f}")
    for share in (1.0, 0.5, 0.25, 0.0):
        grid = policy(image, budget=share).grid
        features, macs = giga_macs(execute_with_grid, net, image, grid)
        similarity = torch.cosine_similarity(features, dense, dim=1).mean()
        high = f"{int(grid.sum())} of {grid.numel()}"
        print(f"{high:>12} {macs:8.2f} {macs / cost:9.0%} {similarity:27.4f}")


if __name__ == "__main__":
    main()
