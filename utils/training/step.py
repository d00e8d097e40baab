"""One optimiser step: a batch, its loss, changed weights; as one CUDA graph where that can be."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice

import torch
from torch import Tensor, nn

from dataloaders import to_network
from segblocks import TrainingGraphs
from segblocks.policy.base import budget_count
from utils.logger import Means
from utils.ranks import Ranks
from utils.training.distributed import Alone
from utils.training.guard import FiniteGuard
from utils.training.objective import Objective
from utils.training.optim import GraphedStep
from utils.training.state import TrainingState
from utils.training.uploads import Uploaded
from utils.training.whole_step import Logged, WholeSteps


class OptimiserStep:
    """Takes steps of a run, each on --accumulate batches.

    Args:
        run: what a step changes.
        objective: the loss.
        shared: how a batch is shared by ranks.
        finite: is told of losses.
        from_graphs: launch what can be as CUDA graphs.
        failed: see TrainingGraphs.
    """

    def __init__(
        self,
        run: TrainingState,
        objective: Objective,
        shared: Alone,
        finite: FiniteGuard,
        ranks: Ranks,
        from_graphs: bool,
        failed: Callable[[], None],
    ):
        self.run, self.objective, self.shared, self.finite = run, objective, shared, finite
        self.args, self.model, self.ranks = run.args, run.model, ranks
        # A scaler decides after each backward pass whether there is a step at all.
        graphed = from_graphs and not run.scaler.is_enabled()
        self._graphed_update = GraphedStep(run.optimizer) if graphed else None
        self._whole: WholeSteps | None = None
        if graphed and ranks.count == 1 and self.args.accumulate == 1:
            how = (self._loss_of, self._update, failed)
            self._whole = WholeSteps(run.model, run.optimizer, *how)

    def __call__(self, batches: Iterator[Uploaded], means: Means) -> None:
        """Take the next batches and a step; what is to be logged goes to `means`."""
        self.run.optimizer.zero_grad(set_to_none=True)
        own = islice(batches, self.args.accumulate)
        if self._whole is None:
            self._in_parts(own, means)
            return
        (batch,) = own
        budget = self._known_budget(batch[0][0])
        if not self._as_a_whole(self._whole, batch, budget, means):
            self._in_parts([batch], means, budget)

    def release(self) -> None:
        """Destroy the graphs of whole steps."""
        if self._whole is not None:
            self._whole.release()

    def _as_a_whole(
        self, whole: WholeSteps, batch: Uploaded, budget: int | None, means: Means
    ) -> bool:
        """Whether the step was taken: not where the host has to know more to launch it."""
        tensors, index = batch
        if self.model.policy.exploration or (budget is None and not self.model.is_dense):
            return False
        result = whole(tensors, budget, self.objective.refines)
        if result is None:
            return False
        loss, logged = result
        means.add_all(logged)
        self.finite.add(loss, index, self.run.progress.total_steps)
        return True

    def _in_parts(
        self, batches: Iterable[Uploaded], means: Means, budget: int | None = None
    ) -> None:
        """`budget`: high blocks of each image; None: as the policy draws or chooses them."""
        accumulate, scaler = self.args.accumulate, self.run.scaler
        for i, (tensors, index) in enumerate(batches):
            self.shared.meet()
            with nullcontext() if i + 1 == accumulate else self.shared.later():
                loss, logged = self._loss_of(tensors, budget)
                weight = self.shared.weight / accumulate
                # Only a loss that is still the graph's own output takes the short way back.
                scaled = scaler.scale(loss if weight == 1 else loss * weight)
                TrainingGraphs.backward(scaled)
            means.add_all(logged)
            self.finite.add(loss.detach(), index, self.run.progress.total_steps)
        self.shared.exchange()
        means.add_all(self._update())

    def _loss_of(self, tensors: Sequence[Tensor], budget: int | None) -> tuple[Tensor, Logged]:
        """Loss of a batch on the device, 0-d, and what to log."""
        image, label = to_network(*tensors, channels_last=self.args.channels_last)
        loss, names, values = self.objective(image, label, budget)
        return loss, [(names, values)]

    def _update(self) -> Logged:
        """Change weights by their gradients -> what to log of these."""
        logged: Logged = []
        if self.args.grad_clip:
            self.run.scaler.unscale_(self.run.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
            share = norm.detach() / self.ranks.count  # to be added up, as the rest
            logged.append((("gradient_norm",), share[None]))
        if self._graphed_update is not None and not torch.cuda.is_current_stream_capturing():
            self._graphed_update()
        else:
            self.run.scaler.step(self.run.optimizer)
            self.run.scaler.update()
        return logged

    def _known_budget(self, image: Tensor) -> int | None:
        """High blocks of each image (N,3,H,W) in the next pass, drawn if it is to be; None: the
        policy decides."""
        policy, budget = self.model.policy, self.args.budget
        rows, columns = (-(-side // policy.block_size) for side in image.shape[2:])
        if budget is None:
            budget = policy.own_budget(rows, columns)
        return None if budget is None else budget_count(budget, rows * columns)
