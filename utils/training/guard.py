"""Notices losses and weights that are not finite, without waiting for the device at every step."""

from collections import deque

import torch
from torch import nn

from dataloaders import SegmentationDataset
from utils.errors import UserError
from utils.ranks import ALONE, Ranks

ADVICE = "lower --lr, set --grad-clip, or use --amp bf16 or off"


class FiniteGuard:
    """Remembers the losses of the latest steps, on their device."""

    def __init__(self, dataset: SegmentationDataset, ranks: Ranks = ALONE):
        self.dataset, self.ranks = dataset, ranks
        self._losses: deque[tuple[torch.Tensor, torch.Tensor, int]] = deque()

    def add(self, loss: torch.Tensor, index: torch.Tensor, step: int) -> None:
        """A 0-d loss of the samples `index` (N,) in step number `step`, counted from 0."""
        self._losses.append((loss, index, step))

    def check(self, model: nn.Module | None = None) -> None:
        """Raise UserError, on all ranks, naming the first bad step since the last check and its
        images on the rank that saw it; or if `model` has weights that are not finite."""
        found = self._first_bad() or (_bad_weights(model) if model else None)
        self._losses.clear()
        bad = [text for text in self.ranks.everyones(found) if text]
        if bad:
            raise UserError(bad[0])

    def _first_bad(self) -> str | None:
        if not self._losses:
            return None
        finite = torch.stack([loss for loss, _, _ in self._losses]).isfinite().tolist()
        for good, (loss, index, step) in zip(finite, self._losses):
            if not good:
                names = ", ".join(self.dataset.name_of(int(i)) for i in index)
                return (
                    f"the loss is {float(loss)} at step {step + 1} (images: {names}); the last "
                    f"checkpoint is from before it: {ADVICE}"
                )
        return None


def _bad_weights(model: nn.Module) -> str | None:
    values = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    if torch.stack([norm.float() for norm in torch._foreach_norm(values)]).isfinite().all():
        return None
    names = [n for n, t in model.state_dict().items() if not t.isfinite().all()]
    if not names:
        return None
    return (
        f"{len(names)} weights are not finite after the last step ({', '.join(names[:3])}), though "
        f"its loss was; they are not saved, and the last checkpoint is from before: {ADVICE}"
    )
