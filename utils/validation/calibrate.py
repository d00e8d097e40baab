"""What a policy adds to each place's scores, and its threshold, from images without labels."""

from argparse import Namespace
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from dataloaders import SegmentationDataset, to_network
from segblocks.borders import pad_to_blocks
from utils.inference import inference_copy, use_half
from utils.logger import progress

CALIBRATION_IMAGES = 128  # of a split, evenly spaced: the policy network alone sees them
TOGETHER = 8  # of them at a time


@torch.no_grad()
def calibrate(
    model: nn.Module, dataset: SegmentationDataset, args: Namespace, device: torch.device
) -> str:
    """Set place and threshold of the model's policy, and nothing else; -> what to log.

    Sampling in training and a threshold of 0 in evaluation spend different shares: probabilities
    are soft, augmented crops are not whole images, and rounding up adds its part. `dataset` holds
    images as validation sees them, of the split that `--segblocks-calibrate` names. A policy is
    surer of images that it was trained on, so shares elsewhere may differ; images of the place
    where it will run need no labels for this.
    """
    half = use_half(args, device)
    policy = inference_copy(model.policy, half)
    policy.train_from_graphs(None)  # which it would capture for this one time
    step = max(1, len(dataset) // CALIBRATION_IMAGES)
    logits: list[Tensor] = []
    indices = progress(range(0, len(dataset), step), "calibrate", "img")
    for pairs in _alike(dataset[index] for index in indices):
        images, _ = to_network(*(torch.stack(x).to(device) for x in zip(*pairs)))
        images = images.half() if half else images
        logits += policy.logits(pad_to_blocks(images, policy.block_size)).unbind()
    share, threshold = model.policy.calibrate(logits), float(model.policy.threshold)
    return (
        f"threshold {threshold:.4f}: {100 * share:.1f} % of the blocks of {len(logits)} "
        f"{args.segblocks_calibrate} images, target {100 * policy.percent_target:.1f} %"
    )


def _alike(pairs: Iterable[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Lists of at most TOGETHER that follow one another and are of equal shapes."""
    alike: list[tuple[Tensor, ...]] = []
    for pair in pairs:
        differs = alike and [x.shape for x in pair] != [x.shape for x in alike[0]]
        if differs or len(alike) == TOGETHER:
            yield alike
            alike = []
        alike.append(pair)
    if alike:
        yield alike
