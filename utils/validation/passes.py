"""Passes over the images of a validation, one at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dataloaders import to_network
from dataloaders.base import derive_seed
from segblocks import SegBlocksModel
from segblocks.reading import Reading
from utils.validation.judge import Judge, Judged
from utils.validation.predict import resize_labels

VAL_SEED = 1  # of random placement in validation, so that a second validation gives the same


@dataclass(frozen=True)
class Pass:
    """A pass on one image.

    Attributes:
        index: number of the image.
        image: (1,3,h,w), as the network took it.
        at_image: (1,h,w) int64, the label at the size of the image.
        gain: (1,Gh,Gw) float, what full resolution saves each block, where that was wanted.
        judged: what came of it.
        again: executes such a pass as a whole, the policy's decision included.
    """

    index: int
    image: Tensor
    at_image: Tensor
    gain: Tensor | None
    judged: Judged
    again: Callable[..., Any]


class Passes:
    """Passes of a frozen model that is one image ahead with its policy: the host launches what the
    policy does on the next image before it waits for how many blocks it has chosen on this one.
    The device has no pause then.

    Args:
        model: in evaluation mode.
        judge: judges what it returns.
        device: where to.
        half: images in half precision.
        budget: of each image; None: as the policy decides.
        gain_of: image, label at its size → see `Pass`.
    """

    def __init__(
        self,
        model: SegBlocksModel,
        judge: Judge,
        device: torch.device,
        half: bool,
        budget: float | int | None,
        gain_of: Callable[[Tensor, Tensor], Tensor | None],
    ):
        self.model, self.judge, self.device, self.half = model, judge, device, half
        self.budget, self.gain_of = budget, gain_of

    def __call__(self, pairs: Iterable[tuple[Tensor, Tensor, int]]) -> Iterator[Pass]:
        """`pairs`: see `one_by_one`. Random numbers, which only the random policy draws, are those
        of VAL_SEED and the image."""
        waiting = None
        for pair in pairs:
            begun = self._begin(*pair)
            if waiting is not None:
                yield waiting()
            waiting = begun
        if waiting is not None:
            yield waiting()

    def _begin(self, image: Tensor, label: Tensor, index: int) -> Callable[[], Pass]:
        """To the policy's decision; what is returned does the rest."""
        torch.manual_seed(derive_seed(VAL_SEED, index))
        pair = (x.to(self.device, non_blocking=True) for x in (image, label))
        image, label = to_network(*pair)
        image = image.half() if self.half else image  # 1,3,h,w; label 1,H,W
        at_image = resize_labels(label, image.shape[-2:])  # 1,h,w
        gain = self.gain_of(image, at_image)
        again = partial(self.model, image, budget=self.budget, block_gain=gain)
        decision = self.model.decide(image, self.budget, gain)
        count = None if decision.n_high is not None else Reading(decision.sampled.sum())

        def end() -> Pass:
            settled = decision
            if count is not None:
                settled = self.model.policy.settle(decision, int(count.wait()))
            act = partial(self.model, image, decision=settled)
            return Pass(index, image, at_image, gain, self.judge(act, label, at_image), again)

        return end
