"""What is particular to checkpoints of the published release."""

import re
from argparse import Namespace
from typing import Any

from torch import Tensor

import segblocks

# The ImageNet classifier that published EfficientNet-Lite checkpoints carry along.
UNUSED_CLASSIFIER = re.compile(r"(^|\.)backbone\.(head|fc)\.")


def is_published(checkpoint: dict[str, Any]) -> bool:
    """Whether the published release wrote a checkpoint: it keeps flags under "config", this
    program under "args"."""
    return {"state_dict", "config"} <= checkpoint.keys() and "args" not in checkpoint


def without_classifier(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without those of an ImageNet classifier that the model has not, by name."""
    return {
        name: value
        for name, value in weights.items()
        if name in own or not UNUSED_CLASSIFIER.search(name)
    }


def settle_upsampling(
    model: segblocks.SegBlocksModel, args: Namespace, checkpoint: dict[str, Any]
) -> list[str]:
    """Where --segblocks-legacy-upsample was not given, take the resizing of blocks with which the
    weights were trained, in `model` and `args`; -> what to tell of it."""
    if args.segblocks_legacy_upsample is not None:
        return []
    published, flags = is_published(checkpoint), checkpoint.get("args")
    legacy = published or (
        isinstance(flags, dict) and flags.get("segblocks_legacy_upsample") is True
    )
    args.segblocks_legacy_upsample = model.legacy_upsample = legacy
    if not legacy or model.is_dense:
        return []
    whose = "published weights" if published else "weights trained in this way"
    return [f"{whose}: each block is resized on its own (--segblocks-legacy-upsample yes)"]
