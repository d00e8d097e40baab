"""Notices losses and weights that are not finite, without waiting for the device at every step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dataloaders import SegmentationDataset
from segblocks.reading import Reading
from utils.errors import UserError
from utils.ranks import ALONE, Ranks

ADVICE = "lower --lr, set --grad-clip, or use --amp bf16 or off"


Step = tuple[Tensor, Tensor, int]  # loss, 0-d; indices of its samples (N,); its number, from 0


class FiniteGuard:
    """Remembers the losses of the latest steps, on their device."""

    def __init__(self, dataset: SegmentationDataset, ranks: Ranks = ALONE):
        self.dataset, self.ranks = dataset, ranks
        self._steps: list[Step] = []

    def add(self, loss: Tensor, index: Tensor, step: int) -> None:
        """A 0-d loss of the samples `index` (N,) in step number `step`, counted from 0."""
        self._steps.append((loss, index, step))

    def ask(self, model: nn.Module | None = None) -> Callable[[], None]:
        """What raises UserError, on all ranks, naming the first bad step since the last time and
        its images on the rank that saw it; or if `model` has weights that are not finite. It is
        about losses and weights as they are now, and waits for no more than the device has been
        told by now."""
        steps, self._steps = self._steps, []
        weights = _weights(model) if model else {}
        values = [loss for loss, _, _ in steps]
        if weights:
            values += torch._foreach_norm(list(weights.values()), ord=torch.inf)
        finite = Reading(torch.stack([x.float() for x in values]).isfinite()) if values else None

        def answer() -> None:
            flags = [] if finite is None else finite.wait().tolist()
            losses, of_weights = flags[: len(steps)], flags[len(steps) :]
            bad = [name for name, good in zip(weights, of_weights) if not good]
            found = self._bad_loss(steps, losses) or (_describe(bad) if bad else None)
            everyones = [text for text in self.ranks.everyones(found) if text]
            if everyones:
                raise UserError(everyones[0])

        return answer

    def _bad_loss(self, steps: Sequence[Step], finite: Sequence[bool]) -> str | None:
        for (loss, index, step), good in zip(steps, finite):
            if not good:
                names = ", ".join(self.dataset.name_of(int(i)) for i in index)
                return (
                    f"the loss is {float(loss)} at step {step + 1} (images: {names}); the last "
                    f"checkpoint is from before it: {ADVICE}"
                )
        return None


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """By name, those that could be infinite or not a number."""
    state = model.state_dict(keep_vars=True).items()
    return {n: t.detach() for n, t in state if t.is_floating_point() and t.numel()}


def _describe(names: Sequence[str]) -> str:
    return (
        f"{len(names)} weights are not finite after the last step ({', '.join(names[:3])}), though "
        f"its loss was; they are not saved, and the last checkpoint is from before: {ADVICE}"
    )
