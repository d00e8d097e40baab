"""A network of one's own on blocks: three lines, then training them with their policy.

python examples/own_network.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segblocks import SegBlocksModel, build_policy, no_blocks

BLOCK = 32
CLASSES = 2


class TinySegmenter(nn.Module):
    """Any network of ordinary layers; it knows nothing of blocks but for `no_blocks`."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.context = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.Sigmoid())
        self.head = nn.Conv2d(32, CLASSES, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.down(image)
        x = x * no_blocks(self.context)(x)  # global pooling needs the whole picture
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return self.head(x)  # N,classes,H/2,W/2


def draw(n: int, side: int = 192) -> tuple[Tensor, Tensor]:
    """Plain images (N, 3, side, side) with fine stripes in a few blocks; labels (N, side, side)."""
    noise = torch.randn(n, 3, side, side) * 0.05
    label = torch.zeros(n, side, side, dtype=torch.long)
    stripes = (torch.arange(BLOCK) // 3 % 2).expand(BLOCK, BLOCK)
    for i in range(n):
        for y, x in torch.randint(0, side // BLOCK, (5, 2)).tolist():
            rows = slice(y * BLOCK, (y + 1) * BLOCK)
            label[i, rows, x * BLOCK : (x + 1) * BLOCK] = stripes
    return noise + label[:, None].float(), label


def main() -> None:
    torch.manual_seed(0)

    # The three lines.
    policy = build_policy("reinforce", block_size=BLOCK, percent_target=0.2)
    model = SegBlocksModel(TinySegmenter(), policy)
    result = model(draw(1)[0])

    print(f"untrained: logits {tuple(result.logits.shape)}, {result.share:.0%} of blocks high")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(60):
        image, label = draw(4)
        result = model(image)
        logits = F.interpolate(result.logits, size=label.shape[1:], mode="bilinear")
        pixel_loss = F.cross_entropy(logits, label, reduction="none")  # N,H,W
        valid = torch.ones_like(label, dtype=torch.bool)
        policy_loss, stats = model.policy.loss(result, pixel_loss, valid)
        loss = pixel_loss.mean() + policy_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {pixel_loss.mean():.3f}, share {stats['share']:.0%}")

    model.eval()
    image, label = draw(8)
    striped = F.max_pool2d(label.float(), BLOCK).bool()  # N,Gh,Gw
    with torch.no_grad():
        for budget in (None, 0.0, 1.0):
            result = model(image, budget=budget)
            logits = F.interpolate(result.logits, size=label.shape[1:], mode="bilinear")
            found, true = logits.argmax(1).bool(), label.bool()
            iou = (found & true).sum() / (found | true).sum()
            name = "as trained" if budget is None else f"budget {budget:.0%}"
            print(
                f"{name}: {result.share:.0%} of blocks high "
                f"({result.grid[striped].float().mean():.0%} of the striped ones), "
                f"IoU of the stripes {iou:.2f}"
            )


if __name__ == "__main__":
    main()
