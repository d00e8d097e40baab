"""The ways to run a network that speed mode compares. A new one is a function and a line in
`build_engines`."""

import copy
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

import segblocks
from segblocks.borders import pad_to_blocks
from segblocks.capturing import without_collection

EAGER = "eager"


@dataclass
class Engine:
    """One way to run one network on images of one size.

    `load` takes an image on the device (N,3,H,W), untimed; `run` is the forward pass that is timed
    and returns what the network returns.
    """

    name: str
    how: str
    on_blocks: bool
    load: Callable[[torch.Tensor], None]
    run: Callable[[], Any]
    budget: float | int | None = None
    captured_bytes: int = 0  # held by a CUDA graph, which allocates nothing when it runs
    fast: segblocks.FastModel | None = None  # which engines of other budgets can share
    is_baseline: bool = False  # full resolution everywhere: what the others are measured by


def build_engines(model: nn.Module, image: torch.Tensor, args: Namespace) -> list[Engine]:
    """Every engine, ready to run images like `image`.

    `model` is a SegBlocksModel in eval mode, of the precision and on the device of `image`.
    """
    builders = [dense_eager, dense_best]
    if args.segblocks_policy != "disabled":
        builders.append(blocks_eager)
        if not model.policy.needs_pixel_loss and can_compile(image):
            builders.append(blocks_fast)
    engines = [build(model, image, args) for build in builders]
    if engines[-1].fast is not None:
        engines.insert(2, all_high(engines[-1].fast, image))
    return engines


def can_compile(image: torch.Tensor) -> bool:
    """Whether a compiled model works in the precision of `image`: on CUDA that is half."""
    return not image.is_cuda or image.dtype != torch.float32


def dense_eager(model: nn.Module, image: torch.Tensor, args: Namespace) -> Engine:
    """The network as it is, on images padded to whole blocks as all others are."""
    layout = "channels_last" if args.channels_last else "contiguous"
    return _eager("dense eager", f"{layout}, {EAGER}", False, model.net, prepare=padding(model))


def dense_best(model: nn.Module, image: torch.Tensor, args: Namespace) -> Engine:
    """The fastest dense network a user could get: channels_last, compiled by Inductor with folded
    batch norm, on CUDA in a CUDA graph. Where compiling is impossible, `how` says so."""
    net = copy.deepcopy(model.net).to(memory_format=torch.channels_last)
    pad = padding(model)
    image = pad(image).contiguous(memory_format=torch.channels_last)
    run, how = compile_dense(net, image, args.speed_autotune)
    if image.is_cuda:
        return _graphed("dense best", f"channels_last, {how}, CUDA graph", run, image, pad)
    return _eager("dense best", f"channels_last, {how}", False, run, prepare=pad)


def blocks_eager(model: nn.Module, image: torch.Tensor, args: Namespace) -> Engine:
    """Policy and network on blocks, operation by operation."""
    call = partial(model, budget=args.budget)
    return _eager("blocks eager", EAGER, True, call, args.budget)


def blocks_fast(model: nn.Module, image: torch.Tensor, args: Namespace) -> Engine:
    """Policy and network on blocks through `segblocks.compile`."""
    return _compiled("blocks fast", segblocks.compile(model, image), image, args.budget)


def all_high(fast: segblocks.FastModel, image: torch.Tensor) -> Engine:
    """The same compiled model with every block at full resolution: where its kernels are faster
    than Inductor's, this is the dense network to beat."""
    engine = _compiled("all high", fast, image, 1.0)
    engine.is_baseline = True
    return engine


def compile_dense(
    net: nn.Module, image: torch.Tensor, autotune: bool
) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """-> (network, how it was made): compiled with Inductor freezing, which folds batch norm, or
    the eager network where this machine cannot compile."""
    if not image.is_cuda and not _cpp_compiler():
        return net, f"{EAGER} (no C++ compiler for torch.compile)"
    compiled = torch.compile(net, options={"freezing": True, "max_autotune": autotune})
    try:
        compiled(image)
    except TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])  # which backend raised, and what
        return net, f"{EAGER} (torch.compile failed: {reason})"
    return compiled, "compiled with Inductor freezing" + (", max-autotune" if autotune else "")


def padding(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a SegBlocksModel does to images first."""
    return partial(pad_to_blocks, block_size=model.policy.block_size)


def _compiled(
    name: str, fast: segblocks.FastModel, image: torch.Tensor, budget: float | int | None
) -> Engine:
    engine = Engine(name, fast.how, True, fast.load, partial(fast.run, budget), budget, fast=fast)
    if image.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fast(image, budget=budget)  # captures the graph
        engine.captured_bytes = torch.cuda.max_memory_allocated() - before
    return engine


def _eager(
    name: str,
    how: str,
    on_blocks: bool,
    call: Callable[[torch.Tensor], Any],
    budget: float | int | None = None,
    prepare: Callable[[torch.Tensor], torch.Tensor] = lambda image: image,
) -> Engine:
    loaded: list[torch.Tensor] = []

    def load(image: torch.Tensor) -> None:
        loaded[:] = [prepare(image)]

    def run() -> Any:
        return call(loaded[0])

    return Engine(name, how, on_blocks, load, run, budget, is_baseline=not on_blocks)


def _graphed(
    name: str,
    how: str,
    call: Callable,
    image: torch.Tensor,
    prepare: Callable[[torch.Tensor], torch.Tensor],
) -> Engine:
    """`call` captured in a CUDA graph with a fixed input like `image`, which `prepare` makes."""
    fixed = image.clone()
    side = torch.cuda.Stream()  # warming up outside the default stream is what capture asks for
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(fixed)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph):
        output = call(fixed)
    captured = torch.cuda.max_memory_allocated() - before

    def run() -> torch.Tensor:
        graph.replay()
        return output

    def load(image: torch.Tensor) -> None:
        fixed.copy_(prepare(image))

    return Engine(name, how, False, load, run, captured_bytes=captured, is_baseline=True)


def _cpp_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)
