"""Learning from what another network says, one that was trained and runs at full resolution.

After Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, for every pixel.
"""

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataloaders import DatasetInfo
from models import build_model
from segblocks import SegBlocksModel, TrainingGraphs, build_policy
from utils.checkpoint import load_checkpoint, load_weights
from utils.inference import inference_copy, use_half
from utils.losses import Total, own_count
from utils.seeding import forked_rng

WEIGHT = 0.5  # of the teacher in the task loss; the labels have the rest
TEMPERATURE = 2.0  # by which logits are divided, so that improbable classes count


class Teacher(nn.Module):
    """A frozen network with every block at full resolution, in half precision if `half`."""

    def __init__(self, dense: SegBlocksModel, half: bool):
        super().__init__()
        self.model, self.half_precision = inference_copy(dense, half), half

    def train_from_graphs(self, graphs: TrainingGraphs | None) -> None:
        """See SegBlocksModel."""
        self.model.train_from_graphs(graphs)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """(N,classes,h,w) logits of images (N,3,H,W), normalised float32."""
        with torch.autocast(image.device.type, enabled=False):
            return self.model(image.half() if self.half_precision else image).logits

    def train(self, mode: bool = True) -> "Teacher":
        return self  # it has learned


def load_teacher(args: Namespace, info: DatasetInfo, device: torch.device) -> Teacher | None:
    """The network of --teacher, a checkpoint of any backbone and policy; None without.

    Raises ValueError where its weights are not those of a network for these classes, and what
    `load_checkpoint` raises.
    """
    if not args.teacher:
        return None
    checkpoint = load_checkpoint(args.teacher)
    flags = vars(args) | (checkpoint.get("args") or {})
    with forked_rng(device, 0):  # what is drawn for its weights is not missing elsewhere
        net = build_model(flags["backbone"], info.num_classes, False, flags["num_features"])
    dense = SegBlocksModel(net, build_policy("disabled", block_size=args.segblocks_block_size))
    try:
        load_weights(dense, args.teacher, checkpoint)
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from error
    if args.channels_last:
        net.to(memory_format=torch.channels_last)
    return Teacher(dense, use_half(args, device)).to(device)


def distillation_loss(
    logits: Tensor, taught: Tensor, valid: Tensor, total: Total = own_count
) -> Tensor:
    """How far predictions are from a teacher's: their Kullback–Leibler divergence at TEMPERATURE,
    times its square, so that gradients are of the size of cross-entropy's; mean over valid pixels,
    0-d. Of pixels without a label, such as those beyond the picture, no teacher knows anything.

    Args:
        logits: (N,classes,h,w) floating point.
        taught: (N,classes,h',w') floating point, no gradient; resized where its size is another.
        valid: (N,H,W) bool, resized as well.
        total: adds a count up over the processes that share the batch, as for `PixelLoss`.
    """
    logits, taught = logits.float() / TEMPERATURE, taught.float() / TEMPERATURE
    if taught.shape[2:] != logits.shape[2:]:
        taught = F.interpolate(taught, logits.shape[2:], mode="bilinear", align_corners=False)
    ours, theirs = logits.log_softmax(1), taught.log_softmax(1)
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
    counts = F.interpolate(valid[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0]
    return TEMPERATURE**2 * (divergence * counts).sum() / total(counts.sum()).clamp(min=1)
