"""What a forward pass is given beside images, where the oracle policy looks at the loss."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def forward_options(
    args: Namespace, criterion: nn.Module, label: Tensor
) -> dict[str, float | int | Callable | None]:
    """What `SegBlocksModel.forward` takes beyond the image: the budget, and for the oracle policy
    the loss it looks at."""
    options: dict[str, Any] = {"budget": args.budget}
    if args.segblocks_policy == "oracle":
        options["pixel_loss"] = pixel_loss_of(criterion, label)
    return options


def pixel_loss_of(criterion: nn.Module, label: Tensor) -> Callable[[Tensor], Tensor]:
    """logits → loss of each pixel, `label` (N,H,W)."""
    return lambda logits: criterion(logits, label)[1]
