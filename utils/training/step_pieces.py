"""An optimiser step as written, whole or in two pieces: to where the host has to know how many
blocks are high, and from there on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from segblocks import Decision, SegBlocksModel
from segblocks.capture import check_outputs, stand_ins_of

Logged = list[tuple[tuple[str, ...], Tensor]]  # names of numbers, and these (len(names),) float
Stepped = tuple[Tensor, Logged]  # loss, 0-d, and what to log
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Begun:
    """A step of which the policy has decided.

    Attributes:
        image, label: of the batch, as the network takes them.
        decision: without the number of high blocks; scores lead back to the policy's parameters.
        count: 0-d int64: how many blocks the policy has chosen.
        stand_ins: for each parameter the tensor that it was in this piece.
    """

    image: Tensor
    label: Tensor
    decision: Decision
    count: Tensor
    stand_ins: dict[Tensor, Tensor]


class StepPieces:
    """What a step does. Where the number of high blocks is given, nothing of it reads the device,
    so that each piece can be part of a CUDA graph.

    Args:
        model: whose parameters change.
        optimizer: what changes them.
        inputs_of: tensors of a batch → image, label.
        decide: image → what the policy decides.
        loss_of: image, label, budget, decision → loss and what to log. Budget and decision, how
            many blocks and which, are not both given.
        update: changes weights by the gradients that are `.grad` then → more to log.
    """

    def __init__(
        self,
        model: SegBlocksModel,
        optimizer: torch.optim.Optimizer,
        inputs_of: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
        decide: Callable[[Tensor], Decision],
        loss_of: Callable[..., Stepped],
        update: Callable[[], Logged],
    ):
        self.model, self.optimizer = model, optimizer
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._inputs_of, self._decide = inputs_of, decide
        self._loss_of, self._update = loss_of, update

    def whole(self, batch: Batch, budget: int | None) -> Stepped:
        """A step that is not cut: where it is no part of a graph, or `budget` says how many blocks
        of each image are high."""
        with stand_ins_of(self.model) as stand_ins:
            loss, logged = self._loss_of(*self._inputs_of(batch), budget)
            check_outputs(loss, [loss], list(stand_ins.values()))
            wanted = [stand_ins[p] for p in self.parameters]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        return self._change(loss, logged, found)

    def begin(self, batch: Batch) -> Begun:
        """The first piece. It may be finished more than once, if it is computed again in between,
        as a graph computes it."""
        # Weights will have changed by then, so autograd is not to compare their versions.
        unwatched = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
        with stand_ins_of(self.model) as stand_ins, unwatched:
            image, label = self._inputs_of(batch)
            decision = self._decide(image)
        scores = decision.scores
        if scores.requires_grad:
            check_outputs(scores, [scores], list(stand_ins.values()))
        return Begun(image, label, decision, decision.sampled.sum(), stand_ins)

    def finish(self, begun: Begun, n_high: int) -> Stepped:
        """The second piece, with so many high blocks in the batch."""
        scores = begun.decision.scores
        entering = scores.detach().requires_grad_(scores.requires_grad)
        decision = replace(begun.decision, scores=entering)
        decision = self.model.policy.promote(decision, n_high)
        leaves = [entering] if entering.requires_grad else []
        with stand_ins_of(self.model) as stand_ins:
            loss, logged = self._loss_of(begun.image, begun.label, decision=decision)
            check_outputs(loss, [loss], [*leaves, *stand_ins.values()])
            wanted = [stand_ins[p] for p in self.parameters]
            found = torch.autograd.grad(loss, leaves + wanted, allow_unused=True)
        found, of_scores = found[len(leaves) :], found[: len(leaves)]
        if leaves and of_scores[0] is not None:
            wanted = [begun.stand_ins[p] for p in self.parameters]
            more = torch.autograd.grad(scores, wanted, of_scores, True, allow_unused=True)
            found = [_sum(gradient, other) for gradient, other in zip(found, more)]
        return self._change(loss, logged, found)

    def _change(self, loss: Tensor, logged: Logged, found: Sequence[Tensor | None]) -> Stepped:
        try:
            for p, gradient in zip(self.parameters, found):
                p.grad = gradient if gradient is None else _laid_out_as(p, gradient)
            return loss.detach(), [*logged, *self._update()]
        finally:
            self.optimizer.zero_grad(set_to_none=True)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


@torch.no_grad()
def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Fused optimisers want both in one order."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)
