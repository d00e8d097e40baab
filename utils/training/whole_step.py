"""Optimiser steps that the host launches as one CUDA graph each."""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from segblocks import SegBlocksModel
from segblocks.capture import Buffers, check_outputs, layout, recorded_in, stand_ins_of
from segblocks.capturing import CaptureFailed, cleared_up

Logged = list[tuple[tuple[str, ...], Tensor]]  # names of numbers, and these (len(names),) float


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    logged: Logged


class WholeSteps:
    """From the bytes of a batch to changed weights, captured once for each setting that occurs.

    `segblocks.TrainingGraphs` has graphs of what network and policy do; what is between them the
    host launches one by one, and on small crops that takes it as long as all the rest takes the
    GPU. Where nothing has to be read from the device in between, because it is known how many
    blocks are high, everything is one graph.

    The first step of a kind runs as written, because libraries set themselves up and Adam makes
    its moments; after it, each setting is captured when it occurs. What cannot be captured is told
    in one warning.

    Args:
        model: whose parameters change.
        optimizer: capturable.
        loss_of: tensors of a batch, budget → loss, 0-d, and what to log.
        update: changes weights by the gradients that are `.grad` then → more to log.
        failed: called when a capture has failed: graphs that draw from the device's generator are
            void then.
    """

    MOST = 64  # captures; further settings run as written

    def __init__(
        self,
        model: SegBlocksModel,
        optimizer: torch.optim.Optimizer,
        loss_of: Callable[..., tuple[Tensor, Logged]],
        update: Callable[[], Logged],
        failed: Callable[[], None],
    ):
        self.model, self.optimizer = model, optimizer
        self._loss_of, self._update, self._failed = loss_of, update, failed
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._seen: set[Hashable] = set()  # kinds of steps that ran as written
        self._moments: object = None
        self._buffers = Buffers()
        self.captured: dict[Hashable, _Captured] = {}
        self.given_up = False

    def __call__(
        self, batch: tuple[Tensor, ...], budget: int | None, kind: Hashable
    ) -> tuple[Tensor, Logged] | None:
        """Take a step -> its loss and what to log; None: that is left to others.

        Args:
            batch: what `loss_of` takes, of any layouts.
            budget: blocks of each image that run high; None for a network without blocks.
            kind: whatever else a step depends on, beside numbers on the device.
        """
        self._notice_other_moments()
        kind = (kind, *map(layout, batch))
        if self.given_up:
            return None
        if kind not in self._seen:
            self._seen.add(kind)
            with _launched_one_by_one(self.model):
                return self._step(batch, budget)
        captured = self._find(batch, budget, kind)
        if captured is None:
            return None
        self._buffers.place(batch)
        captured.graph.replay()
        # Whoever keeps what he has made of weights asks them whether they have changed.
        torch.autograd.graph.increment_version(self._parameters)
        # The next step writes to the same memory.
        return captured.loss.clone(), [(names, x.clone()) for names, x in captured.logged]

    def release(self) -> None:
        """Destroy all graphs, with the memory that they hold."""
        for captured in self.captured.values():
            captured.graph.reset()
        self.captured.clear()
        self._buffers = Buffers()

    def _notice_other_moments(self) -> None:
        state = self.optimizer.state
        if state is not self._moments:  # before the first step, or a checkpoint was loaded
            self._moments = state
            self._seen.clear()
            self.release()

    def _find(
        self, batch: tuple[Tensor, ...], budget: int | None, kind: Hashable
    ) -> _Captured | None:
        key = (kind, budget)
        if key in self.captured:
            return self.captured[key]
        # Moments that a step makes are not for a graph, which would make them again each time.
        has_moments = all(p in self.optimizer.state for p in self._parameters)
        if not has_moments or len(self.captured) >= self.MOST:
            return None
        try:
            self.captured[key] = self._capture(batch, budget)
        except CaptureFailed as failure:
            self.given_up = True
            self.release()
            self._failed()
            warnings.warn(f"steps are launched in parts: {failure}", stacklevel=3)
        if self.given_up:
            torch.cuda.empty_cache()  # of the failed step, which lived as long as its error
        return self.captured.get(key)

    def _capture(self, batch: tuple[Tensor, ...], budget: int | None) -> _Captured:
        device, buffers = batch[0].device, self._buffers
        inputs, graph = buffers.inputs(batch), torch.cuda.CUDAGraph()
        recorded = recorded_in(graph, buffers.pool, buffers.stream(device))
        with cleared_up(device, buffers.pool), torch.cuda.device(device), recorded:
            return _Captured(graph, *self._step(tuple(inputs), budget))

    def _step(self, batch: tuple[Tensor, ...], budget: int | None) -> tuple[Tensor, Logged]:
        with stand_ins_of(self.model) as stand_ins:
            loss, logged = self._loss_of(batch, budget)
            check_outputs(loss, [loss], list(stand_ins.values()))
            wanted = [stand_ins[p] for p in self._parameters]
            found = torch.autograd.grad(loss, wanted, allow_unused=True)
        try:
            for p, gradient in zip(self._parameters, found):
                p.grad = gradient if gradient is None else _laid_out_as(p, gradient)
            return loss.detach(), [*logged, *self._update()]
        finally:
            self.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _launched_one_by_one(model: SegBlocksModel) -> Iterator[None]:
    """Graphs of its parts are not captured for steps that will be captured whole."""
    graphs = model.graphs
    model.train_from_graphs(None)
    try:
        yield
    finally:
        model.train_from_graphs(graphs)


@torch.no_grad()
def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Fused optimisers want both in one order."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)
