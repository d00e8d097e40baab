"""Optimiser steps that the host launches as one CUDA graph each, or two."""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from segblocks import SegBlocksModel
from segblocks.capture import Buffers, layout, recorded_in
from segblocks.capturing import CaptureFailed, cleared_up
from segblocks.reading import Reading
from utils.training.step_pieces import Batch, Stepped, StepPieces


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    result: Any  # of the piece, in the memory that the graph writes


class WholeSteps:
    """From the bytes of a batch to changed weights, captured once for each setting that occurs.

    `segblocks.TrainingGraphs` has graphs of what network and policy do; what is between them the
    host launches one by one, and on small crops that takes it as long as all the rest takes the
    GPU. Where nothing has to be read from the device in between, because it is known how many
    blocks are high, everything is one graph. Where the policy decides that, there are two, with
    nothing between but the number on its way to the host.

    The first step of a kind runs as written, because libraries set themselves up and Adam makes
    its moments; after it, each setting is captured when it occurs. What cannot be captured is told
    in one warning.

    Args:
        pieces: what a step does; its optimiser is capturable.
        give_up: called when a capture has failed: graphs that draw from the device's generator are
            void then.
    """

    MOST = 64  # captures; further settings run as written

    def __init__(self, pieces: StepPieces, give_up: Callable[[], None]):
        self.pieces, self._give_up = pieces, give_up
        self.model, self.optimizer = pieces.model, pieces.optimizer
        self._parameters = pieces.parameters
        self._seen: set[Hashable] = set()  # kinds of steps that ran as written
        self._moments: object = None
        self._buffers = Buffers()
        self.captured: dict[Hashable, _Captured] = {}
        self.given_up = False

    def __call__(
        self, batch: Batch, budget: int | None, kind: Hashable, decides: bool = False
    ) -> Stepped | None:
        """Take a step -> its loss and what to log; None: that is left to others.

        Args:
            batch: what the pieces take, of any layouts.
            budget: blocks of each image that run high; None for a network without blocks, and where
                the policy decides.
            kind: whatever else a step depends on, beside numbers on the device.
            decides: whether the policy decides how many blocks are high.
        """
        self._notice_other_moments()
        kind = (kind, *map(layout, batch))
        if self.given_up:
            return None
        if kind not in self._seen:
            self._seen.add(kind)
            with _launched_one_by_one(self.model):
                return self.pieces.whole(batch, budget)
        if decides:
            return self._in_two(batch, kind)
        captured = self._find((kind, budget), batch, partial(self.pieces.whole, budget=budget))
        if captured is None:
            return None
        self._buffers.place(batch)
        return self._replay(captured)

    def release(self) -> None:
        """Destroy all graphs, with the memory that they hold."""
        for captured in self.captured.values():
            captured.graph.reset()
        self.captured.clear()
        self._buffers = Buffers()

    def _in_two(self, batch: Batch, kind: Hashable) -> Stepped | None:
        first = self._find((kind, "begin"), batch, self.pieces.begin)
        if first is None:
            return None
        self._buffers.place(batch)
        first.graph.replay()
        begun, policy = first.result, self.model.policy
        count = Reading(begun.count).wait()
        n_high = policy.rounded_up(count, begun.decision.sampled.numel())
        finish = partial(self.pieces.finish, begun, n_high)
        second = self._find((kind, "finish", n_high), batch, lambda _: finish())
        if second is not None:
            return self._replay(second)
        # It has begun, so nobody else can take it.
        with _launched_one_by_one(self.model):
            return finish()

    def _replay(self, captured: _Captured) -> Stepped:
        captured.graph.replay()
        # Whoever keeps what he has made of weights asks them whether they have changed.
        torch.autograd.graph.increment_version(self._parameters)
        loss, logged = captured.result
        # The next step writes to the same memory.
        return loss.clone(), [(names, x.clone()) for names, x in logged]

    def _notice_other_moments(self) -> None:
        state = self.optimizer.state
        if state is not self._moments:  # before the first step, or a checkpoint was loaded
            self._moments = state
            self._seen.clear()
            self.release()

    def _find(self, key: Hashable, batch: Batch, piece: Callable[[Batch], Any]) -> _Captured | None:
        if key in self.captured:
            return self.captured[key]
        # Moments that a step makes are not for a graph, which would make them again each time.
        has_moments = all(p in self.optimizer.state for p in self._parameters)
        if not has_moments or len(self.captured) >= self.MOST:
            return None
        try:
            self.captured[key] = self._capture(batch, piece)
        except CaptureFailed as failure:
            self.given_up = True
            self.release()
            self._give_up()
            warnings.warn(f"steps are launched in parts: {failure}", stacklevel=4)
        if self.given_up:
            torch.cuda.empty_cache()  # of the failed step, which lived as long as its error
        return self.captured.get(key)

    def _capture(self, batch: Batch, piece: Callable[[Batch], Any]) -> _Captured:
        device, buffers = batch[0].device, self._buffers
        inputs, graph = buffers.inputs(batch), torch.cuda.CUDAGraph()
        recorded = recorded_in(graph, buffers.pool, buffers.stream(device))
        with cleared_up(device, buffers.pool), torch.cuda.device(device), recorded:
            return _Captured(graph, piece(tuple(inputs)))


@contextmanager
def _launched_one_by_one(model: SegBlocksModel) -> Iterator[None]:
    """Graphs of its parts are not captured for steps that will be captured whole."""
    graphs = model.graphs
    model.train_from_graphs(None)
    try:
        yield
    finally:
        model.train_from_graphs(graphs)
