"""One image shape of a compiled model: static input, the recorded network, captured CUDA graphs."""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..borders import crop_output
from ..capturing import CaptureFailed, cleared_up
from ..grid import BlockGrid
from ..model import SegBlocksOutput
from ..ops import choose_slots
from ..ops.cuda.overlap import overlapping
from ..policy import Policy
from ..policy.base import budget_count
from .network import build_network
from .policy import Chosen, PolicyKernels

MAX_GRAPHS = 32
_GRAPH = ", CUDA graph"


@dataclass(frozen=True)
class Engine:
    """What the plans of all shapes share.

    Attributes:
        net: in the working dtype.
        policy: decides on scores; in float32, with its batch norm folded in.
        scorer: the same in the working dtype. policy_kernels: in its place, where they apply.
        overlap: let kernels in a graph start while those ahead of them still run, where they can.
    """

    net: nn.Module
    policy: Policy
    scorer: Policy
    policy_kernels: PolicyKernels | None
    device: torch.device
    dtype: torch.dtype
    legacy_upsample: bool
    overlap: bool


@dataclass
class _Graph:
    """A captured CUDA graph with the tensors that its replay fills."""

    graph: torch.cuda.CUDAGraph
    result: SegBlocksOutput


class Plan:
    """Everything for one image shape: static input, the recorded network, captured graphs."""

    def __init__(self, engine: Engine, image: Tensor):
        self.engine = engine
        block = engine.policy.block_size
        n, _, height, width = image.shape
        self.size = (height, width)
        self.padded = (-(-height // block) * block, -(-width // block) * block)
        self.grid_shape = (n, self.padded[0] // block, self.padded[1] // block)
        self.blocks = math.prod(self.grid_shape)
        shape = (n, image.shape[1], *self.padded)
        # Of the working dtype: loading converts, and nobody reads the image in any other.
        self.image = torch.zeros(shape, dtype=engine.dtype, device=engine.device)
        self.image = self.image.contiguous(memory_format=torch.channels_last)
        self.mask = torch.zeros(self.grid_shape, dtype=torch.bool, device=engine.device)
        self.scores = torch.zeros(self.grid_shape, dtype=torch.float32, device=engine.device)
        self.count = torch.zeros((), dtype=torch.int64, device=engine.device)
        self.run_network, how = build_network(
            engine.net, self.image, self.grid_shape, engine.legacy_upsample
        )
        self.how = how + (_GRAPH if engine.device.type == "cuda" else "")
        kernels = engine.policy_kernels
        self.policy_kernels = None if kernels is None else kernels.for_another_stream()
        self.graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        # One stream for all captures: blocks of memory belong to the stream they were made on, also
        # in the pool that graphs share.
        self.stream = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if engine.device.type == "cuda" else None

    # -- the three ways to a grid -----------------------------------------------------------------

    def decide_and_run(self, budget: float | int | None) -> SegBlocksOutput:
        policy = self.engine.policy
        if budget is None:
            budget = policy.default_budget(*self.grid_shape[1:])
        if budget is not None:
            count = budget_count(budget, self.grid_shape[1] * self.grid_shape[2])
            return self.replay(("budget", count), lambda: self._spend(count))
        self.replay(("decide",), self._decide)
        wanted = policy.rounded_up(int(self.count), self.blocks)
        return self.replay(("promote", wanted), lambda: self._promote(wanted))

    def run_grid(self, grid: Tensor, n_high: int | None) -> Any:
        if tuple(grid.shape) != self.grid_shape or grid.dtype != torch.bool:
            raise ValueError(
                f"grid must be bool {self.grid_shape} for this image, got {grid.dtype} "
                f"{tuple(grid.shape)}"
            )
        self.mask.copy_(grid)
        n_high = int(self.mask.sum()) if n_high is None else n_high
        return self.replay(("given", n_high), lambda: self._given(n_high)).logits

    def load(self, image: Tensor) -> None:
        self.image[:, :, : self.size[0], : self.size[1]].copy_(image)

    # -- what is captured -------------------------------------------------------------------------

    def _policy_scores(self) -> Tensor:
        if self.policy_kernels is not None:
            return self.policy_kernels.scores(self.image)
        return self.engine.scorer.scores(self.image, None).float()

    def _spend(self, count: int) -> SegBlocksOutput:
        chosen = None
        if self.policy_kernels is not None:
            chosen = self.policy_kernels.spend(self.image, count)
        if chosen is None:
            scores = self._policy_scores()
            chosen = Chosen(scores, *choose_slots(scores, count))
        grid = self._block_grid(chosen.grid, chosen.slot, chosen.cells, self.grid_shape[0] * count)
        return self._finish(grid, chosen.grid, chosen.scores)

    def _decide(self) -> SegBlocksOutput:
        self.scores.copy_(self._policy_scores())
        self.mask.copy_(self.engine.policy.choose(self.scores))
        torch.sum(self.mask, dim=(0, 1, 2), out=self.count)
        return SegBlocksOutput(self.mask, self.mask, None, self.scores)

    def _promote(self, wanted: int) -> SegBlocksOutput:
        grid = self._block_grid(*choose_slots(self.scores, wanted, self.mask), wanted)
        return self._finish(grid, self.mask, self.scores)

    def _given(self, n_high: int) -> SegBlocksOutput:
        grid = BlockGrid.from_mask(self.mask, n_high, self.engine.legacy_upsample)
        return self._finish(grid, self.mask, None)

    def _block_grid(self, mask: Tensor, slot: Tensor, cells: Tensor, n_high: int) -> BlockGrid:
        return BlockGrid(mask, slot, cells, n_high, self.engine.legacy_upsample)

    def _finish(self, grid: BlockGrid, sampled: Tensor, scores: Tensor | None) -> SegBlocksOutput:
        logits = crop_output(self.run_network(self.image, grid), self.padded, self.size)
        stochastic = scores is not None and self.engine.policy.stochastic
        return SegBlocksOutput(grid.mask, sampled, grid.n_high, scores, stochastic, logits=logits)

    # -- graphs ---------------------------------------------------------------------------------

    def replay(self, key: tuple, function: Callable[[], SegBlocksOutput]) -> SegBlocksOutput:
        captured = None if self.pool is None else self._graph(key, function)
        if captured is None:
            made = function()  # the caller's own, where nothing is captured
            scores = None if made.scores is None else made.scores.clone()
            return replace(
                made, grid=made.grid.clone(), sampled=made.sampled.clone(), scores=scores
            )
        captured.graph.replay()
        return replace(captured.result)

    def _graph(self, key: tuple, function: Callable[[], SegBlocksOutput]) -> _Graph | None:
        """None where the network cannot be captured, from then on."""
        if key not in self.graphs:
            if len(self.graphs) >= MAX_GRAPHS:
                self.graphs.popitem(last=False)  # the one unused for longest
            try:
                self.graphs[key] = self._capture(function)
            except CaptureFailed as failure:
                net = type(self.engine.net).__name__
                warnings.warn(f"{net} runs without CUDA graphs: {failure}", stacklevel=7)
                self.pool, self.how = None, self.how.removesuffix(_GRAPH)
                self.graphs.clear()
        if self.pool is None:
            torch.cuda.empty_cache()  # of the failed pass, which lived as long as its error
            return None
        self.graphs.move_to_end(key)
        return self.graphs[key]

    def _capture(self, function: Callable[[], SegBlocksOutput]) -> _Graph:
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream(self.engine.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, lets cuDNN choose, warms the allocator
                function()
        torch.cuda.current_stream(self.engine.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that pin memory for the next batch, say, go on meanwhile.
        capture = torch.cuda.graph(graph, self.pool, stream, capture_error_mode="thread_local")
        with cleared_up(self.engine.device, self.pool), capture, overlapping(self.engine.overlap):
            result = function()
        return _Graph(graph, result)
