"""Validations of a run: the threshold fitted first, figures in the log and in TensorBoard."""

import time
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader

from dataloaders import SegmentationDataset
from utils.logger import RunLog
from utils.ranks import Ranks
from utils.validation.calibrate import calibrate
from utils.validation.evaluate import Evaluation, Kept, evaluate


class Validations:
    """Of the weights of a run and of their average.

    Args:
        failed: see TrainingGraphs.

    Attributes:
        calibration_set: images as validation sees them, where the policy's threshold is fitted
            on some.
    """

    def __init__(
        self,
        loader: DataLoader,
        args: Namespace,
        device: torch.device,
        ranks: Ranks,
        failed: Callable[[], None],
    ):
        self.loader, self.args, self.device, self.ranks = loader, args, device, ranks
        self.kept = Kept(args, device, failed)
        self.calibration_set: SegmentationDataset | None = None

    def __call__(
        self, model: nn.Module, log: RunLog, step: int, averaged: bool = False
    ) -> Evaluation:
        """Fit the threshold, if that is wanted, and validate. Pictures are not those of `averaged`
        weights."""
        started, args = time.monotonic(), self.args
        if averaged:
            args = Namespace(**{**vars(args), "num_viz_images": 0})
        if self.calibration_set is not None:
            log.info(f"  {calibrate(model, self.calibration_set, args, self.device)}")
        evaluation = evaluate(
            model, self.loader, args, self.device, log, step, self.ranks, self.kept
        )
        what = "average of weights" if averaged else "weights"
        log.info(f"  {what} ({time.monotonic() - started:.0f} s):")
        for line in evaluation.lines():
            log.info(f"    {line}")
        prefix = "ema_" if averaged else ""
        log.scalars(step, {f"{prefix}{name}": x for name, x in evaluation.scalars().items()})
        return evaluation
