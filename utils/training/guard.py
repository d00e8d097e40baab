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

    def check(self, model: nn.Module | None = None) -> None:
        """Raise UserError, on all ranks, naming the first bad step since the last check and its
        images on the rank that saw it; or if `model` has weights that are not finite."""
        self.ask(model)()

    def ask(self, model: nn.Module | None = None) -> Callable[[], None]:
        """The same in two parts: what is returned raises, and waits for no more than the device
        has been told by now."""
        steps, self._steps = self._steps, []
        values = [loss for loss, _, _ in steps] + (_norms(model) if model else [])
        bad = Reading((~torch.stack(values).isfinite()).sum()) if values else None

        def answer() -> None:
            found = None
            if bad is not None and bad.wait():
                found = self._first_bad(steps) or (_bad_weights(model) if model else None)
            everyones = [text for text in self.ranks.everyones(found) if text]
            if everyones:
                raise UserError(everyones[0])

        return answer

    def _first_bad(self, steps: Sequence[Step]) -> str | None:
        for loss, index, step in steps:
            if not loss.isfinite():
                names = ", ".join(self.dataset.name_of(int(i)) for i in index)
                return (
                    f"the loss is {float(loss)} at step {step + 1} (images: {names}); the last "
                    f"checkpoint is from before it: {ADVICE}"
                )
        return None


def _norms(model: nn.Module) -> list[Tensor]:
    """Of its weights, 0-d float32: infinite or not a number where any of them is."""
    values = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return [norm.float() for norm in torch._foreach_norm(values)]


def _bad_weights(model: nn.Module) -> str | None:
    names = [n for n, t in model.state_dict().items() if not t.isfinite().all()]
    if not names:  # weights so large that their norm is not finite are weights
        return None
    return (
        f"{len(names)} weights are not finite after the last step ({', '.join(names[:3])}), though "
        f"its loss was; they are not saved, and the last checkpoint is from before: {ADVICE}"
    )
