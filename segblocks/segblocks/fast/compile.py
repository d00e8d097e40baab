"""`segblocks.compile`: from policy to logits in CUDA graphs, on kernels that fuse whole layers."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from ..grid import BlockGrid
from ..model import SegBlocksModel, SegBlocksOutput, crop_output
from ..ops import choose_slots
from ..policy.base import budget_count
from .network import build_network, is_hopper
from .policy import Chosen, PolicyKernels

MAX_GRAPHS = 32


def compile(model: SegBlocksModel, image: Tensor, dtype: torch.dtype | None = None) -> "FastModel":
    """Make a fast inference version of a model.

    Args:
        model: a SegBlocksModel in evaluation mode. Its parameters are copied, batch norm folded and
            converted to `dtype`; the model itself stays as it is. Compile again after training on.
        image: (N, 3, H, W) example on the device to run on; its values do not matter. Other shapes
            may be given later and are compiled once, on first use.
        dtype: float16 or bfloat16 on CUDA (default float16); float32 on CPU.

    Returns:
        `fast`: `fast(image, budget=None)` returns what `model(image, budget)` returns. On CUDA
        the returned tensors are static buffers that the next call overwrites.

    Raises:
        ValueError: the model is in training mode, runs dense (`disabled`), or needs labels
            (`oracle`); or a dtype that the device cannot do.
    """
    fast = FastModel(model, image.device, image.dtype, dtype)
    fast.warm_up(image)
    return fast


@dataclass
class _Graph:
    """A captured CUDA graph with the tensors that its replay fills."""

    graph: torch.cuda.CUDAGraph
    result: SegBlocksOutput


class FastModel:
    """A compiled model; see `compile`."""

    def __init__(
        self,
        model: SegBlocksModel,
        device: torch.device,
        image_dtype: torch.dtype,
        dtype: torch.dtype | None = None,
    ):
        if model.training:
            raise ValueError("compile is for inference: call model.eval() first")
        if model.is_dense:
            raise ValueError(
                "the 'disabled' policy runs the dense network, which needs no blocks; use "
                "torch.compile(model.net), or build another policy"
            )
        if model.policy.needs_pixel_loss:
            raise ValueError("the 'oracle' policy needs labels and cannot be compiled; use another")
        self.device = device
        self.image_dtype = image_dtype
        self.dtype = _working_dtype(device, dtype)
        self.legacy_upsample = model.legacy_upsample
        copied = copy.deepcopy(model).to(device=device, dtype=self.dtype).requires_grad_(False)
        self.net = copied.net.to(memory_format=torch.channels_last)
        folded = _fold_batch_norm(copy.deepcopy(model.policy).to(device, torch.float32))
        folded = folded.requires_grad_(False)
        kernels = is_hopper(device) and self.dtype.itemsize == 2
        self.policy_kernels = PolicyKernels.of(folded, self.dtype) if kernels else None
        self.policy = folded.to(dtype=self.dtype, memory_format=torch.channels_last)
        self._plans: dict[tuple, _Plan] = {}

    def warm_up(self, image: Tensor) -> None:
        """Compile for this image's shape."""
        self._plan(image)

    @property
    def how(self) -> str:
        """In a few words, how the shapes compiled so far are run."""
        ways = dict.fromkeys(plan.how for plan in self._plans.values())
        return "; ".join(ways)

    @torch.inference_mode()
    def __call__(self, image: Tensor, budget: float | int | None = None) -> SegBlocksOutput:
        """What the model returns for (N, 3, H, W) `image`; see `SegBlocksModel.forward`."""
        return self._plan(image).decide_and_run(image, budget)

    @torch.inference_mode()
    def execute(self, image: Tensor, grid: Tensor, n_high: int | None = None) -> Any:
        """The network's output for a given grid (N, Gh, Gw) bool; see `execute_with_grid`."""
        return self._plan(image).run_grid(image, grid, n_high)

    def _plan(self, image: Tensor) -> "_Plan":
        if image.dim() != 4 or not image.is_floating_point():
            raise TypeError(
                f"image must be floating point (N, C, H, W); got {image.dtype} {tuple(image.shape)}"
            )
        if image.device != self.device or image.dtype != self.image_dtype:
            raise ValueError(
                f"compiled for {self.image_dtype} images on {self.device}, got {image.dtype} on "
                f"{image.device}; convert the image, or compile for it"
            )
        shape = tuple(image.shape)
        if shape not in self._plans:
            with torch.inference_mode():
                self._plans[shape] = _Plan(self, image)
        return self._plans[shape]


class _Plan:
    """Everything for one image shape: static input, the recorded network, captured graphs."""

    def __init__(self, fast: FastModel, image: Tensor):
        self.fast = fast
        block = fast.policy.block_size
        n, _, height, width = image.shape
        self.size = (height, width)
        self.padded = (-(-height // block) * block, -(-width // block) * block)
        self.grid_shape = (n, self.padded[0] // block, self.padded[1] // block)
        self.blocks = math.prod(self.grid_shape)
        shape = (n, image.shape[1], *self.padded)
        # Of the working dtype: loading converts, and nobody reads the image in any other.
        self.image = torch.zeros(shape, dtype=fast.dtype, device=fast.device)
        self.image = self.image.contiguous(memory_format=torch.channels_last)
        self.mask = torch.zeros(self.grid_shape, dtype=torch.bool, device=fast.device)
        self.scores = torch.zeros(self.grid_shape, dtype=torch.float32, device=fast.device)
        self.count = torch.zeros((), dtype=torch.int64, device=fast.device)
        self.run_network, how = build_network(
            fast.net, self.image, self.grid_shape, fast.legacy_upsample
        )
        self.how = how + (", CUDA graph" if fast.device.type == "cuda" else "")
        self.graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self.pool = torch.cuda.graph_pool_handle() if fast.device.type == "cuda" else None

    # -- the three ways to a grid -----------------------------------------------------------------

    def decide_and_run(self, image: Tensor, budget: float | int | None) -> SegBlocksOutput:
        self.load(image)
        policy = self.fast.policy
        if budget is None:
            budget = policy.default_budget(*self.grid_shape[1:])
        if budget is not None:
            count = budget_count(budget, self.grid_shape[1] * self.grid_shape[2])
            return self.replay(("budget", count), lambda: self._spend(count))
        self.replay(("decide",), self._decide)
        wanted = policy.rounded_up(int(self.count), self.blocks)
        return self.replay(("promote", wanted), lambda: self._promote(wanted))

    def run_grid(self, image: Tensor, grid: Tensor, n_high: int | None) -> Any:
        self.load(image)
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
        if self.fast.policy_kernels is not None:
            return self.fast.policy_kernels.scores(self.image)
        return self.fast.policy.scores(self.image, None).float()

    def _spend(self, count: int) -> SegBlocksOutput:
        chosen = None
        if self.fast.policy_kernels is not None:
            chosen = self.fast.policy_kernels.spend(self.image, count)
        if chosen is None:
            scores = self._policy_scores()
            chosen = Chosen(scores, *choose_slots(scores, count))
        grid = self._block_grid(chosen.grid, chosen.slot, chosen.cells, self.grid_shape[0] * count)
        return self._finish(grid, chosen.grid, chosen.scores)

    def _decide(self) -> SegBlocksOutput:
        self.scores.copy_(self._policy_scores())
        self.mask.copy_(self.fast.policy.choose(self.scores))
        torch.sum(self.mask, dim=(0, 1, 2), out=self.count)
        return SegBlocksOutput(self.mask, self.mask, None, self.scores)

    def _promote(self, wanted: int) -> SegBlocksOutput:
        grid = self._block_grid(*choose_slots(self.scores, wanted, self.mask), wanted)
        return self._finish(grid, self.mask, self.scores)

    def _given(self, n_high: int) -> SegBlocksOutput:
        grid = BlockGrid.from_mask(self.mask, n_high, self.fast.legacy_upsample)
        return self._finish(grid, self.mask, None)

    def _block_grid(self, mask: Tensor, slot: Tensor, cells: Tensor, n_high: int) -> BlockGrid:
        return BlockGrid(mask, slot, cells, n_high, self.fast.legacy_upsample)

    def _finish(self, grid: BlockGrid, sampled: Tensor, scores: Tensor | None) -> SegBlocksOutput:
        logits = crop_output(self.run_network(self.image, grid), self.padded, self.size)
        stochastic = scores is not None and self.fast.policy.stochastic
        return SegBlocksOutput(grid.mask, sampled, grid.n_high, scores, stochastic, logits=logits)

    # -- graphs ---------------------------------------------------------------------------------

    def replay(self, key: tuple, function: Callable[[], SegBlocksOutput]) -> SegBlocksOutput:
        if self.pool is None:
            made = function()  # the caller's own, where nothing is captured
            scores = None if made.scores is None else made.scores.clone()
            return replace(
                made, grid=made.grid.clone(), sampled=made.sampled.clone(), scores=scores
            )
        if key not in self.graphs:
            if len(self.graphs) >= MAX_GRAPHS:
                self.graphs.popitem(last=False)  # the one unused for longest
            self.graphs[key] = self._capture(key, function)
        self.graphs.move_to_end(key)
        captured = self.graphs[key]
        captured.graph.replay()
        return replace(captured.result)

    def _capture(self, key: tuple, function: Callable[[], SegBlocksOutput]) -> _Graph:
        stream = torch.cuda.Stream(self.fast.device)
        stream.wait_stream(torch.cuda.current_stream(self.fast.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, lets cuDNN choose, warms the allocator
                function()
        torch.cuda.current_stream(self.fast.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            result = function()
        return _Graph(graph, result)


def _working_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    if device.type == "cuda":
        dtype = dtype or torch.float16
        accepted = (torch.float16, torch.bfloat16)
    else:
        dtype = dtype or torch.float32
        accepted = (torch.float32,)
    if dtype not in accepted:
        names = " or ".join(str(d) for d in accepted)
        raise ValueError(f"on {device.type} the working dtype is {names}; got {dtype}")
    return dtype


def _fold_batch_norm(module: nn.Module) -> nn.Module:
    """Fold batch norms into the convolutions before them, inside `nn.Sequential`s; in place."""
    for part in module.modules():
        if not isinstance(part, nn.Sequential):
            continue
        for i, (conv, norm) in enumerate(zip(part, list(part)[1:])):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                part[i], part[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return module
