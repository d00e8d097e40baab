"""Copies of a model that validation and timing run, so that the original is never touched."""

import copy
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import nn

from segblocks import SegBlocksModel, TrainingGraphs


def inference_copy(model: nn.Module, half: bool) -> nn.Module:
    """A frozen copy in eval mode, in half precision or its own."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    return model.half() if half else model


def use_half(args: Namespace, device: torch.device) -> bool:
    """--fp16 is for CUDA: on a CPU half precision saves nothing."""
    return args.fp16 and device.type == "cuda"


class KeptCopy:
    """A copy that later weights go into, so that the CUDA graphs which it runs from stay.

    Args:
        half: in half precision.
        from_graphs: run from CUDA graphs, in place of one kernel after the other.
        failed: see TrainingGraphs.
    """

    def __init__(self, half: bool, from_graphs: bool, failed: Callable[[], None] | None = None):
        self.half, self.from_graphs, self._failed = half, from_graphs, failed
        self._copy: SegBlocksModel | None = None

    @torch.no_grad()
    def of(self, model: SegBlocksModel) -> SegBlocksModel:
        """The copy with the weights that `model`, always of the same architecture, has now."""
        if self._copy is None:
            self._copy = inference_copy(model, self.half)
            graphs = TrainingGraphs(frozen=True, failed=self._failed) if self.from_graphs else None
            self._copy.train_from_graphs(graphs)
            return self._copy
        for own, new in zip(self._copy.parameters(), model.parameters(), strict=True):
            own.copy_(new)
        for own, new in zip(self._copy.buffers(), model.buffers(), strict=True):
            own.copy_(new)
        return self._copy

    def release(self) -> None:
        """Destroy the graphs, with the memory that they hold."""
        if self._copy is not None and self._copy.graphs is not None:
            self._copy.graphs.release()
