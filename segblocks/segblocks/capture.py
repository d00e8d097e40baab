"""One forward and one backward pass of a network as CUDA graphs; see `graphs` for when."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .structure import find, map_structure


class Ticket:
    """Of a forward pass, held by its autograd node."""

    done = False  # the backward pass has been


class Place:
    """Where an output stands in the structure that a network returns."""


@dataclass
class Buffers:
    """Memory that graphs read and write, outside the pool that they share for the rest: the next
    capture is to find that empty."""

    pool: Any = field(default_factory=torch.cuda.graph_pool_handle)
    _tensors: dict[Hashable, Tensor] = field(default_factory=dict)

    def like(self, x: Tensor, *name: Hashable) -> Tensor:
        """Of this name and of the layout of `x`, the same for all settings."""
        key = (*name, layout(x))
        if key not in self._tensors:
            self._tensors[key] = torch.empty_like(x, requires_grad=False)
        return self._tensors[key]


@dataclass(frozen=True)
class Captured:
    """The graphs of one setting and the memory that they read and write.

    Attributes:
        forward: its graphs, in order.
        fixed: numbers of the outputs without gradient.
        entering: gradients of the outputs.
        gradients: of the parameters; None for those that the outputs do not depend on.
        structure: what the network returns, with a Place for each tensor.
        kept: whatever the setting is told by, so that nothing else gets its identity.
    """

    forward: tuple[torch.cuda.CUDAGraph, ...]
    backward: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]
    fixed: list[int]
    entering: list[Tensor]
    parameters: list[Tensor]
    gradients: list[Tensor | None]
    structure: Any
    kept: Any

    def run(self, inputs: tuple[Tensor, ...], ticket: Ticket) -> Any:
        """What the network returns for other inputs of the same layout, with its gradient."""
        outputs = iter(_Replay.apply(self, ticket, inputs, *self.parameters))
        return map_structure(self.structure, Place, lambda _: next(outputs))


def capture(
    net: nn.Module, function: Callable, inputs: tuple[Tensor, ...], buffers: Buffers, kept: Any
) -> Captured:
    """Capture `function(*inputs)` and the gradient of its outputs in the parameters of `net`.

    Raises:
        RuntimeError: something in it waits for the device, or is no part of a graph otherwise.
    """
    fixed = [buffers.like(x, "input", i) for i, x in enumerate(inputs)]
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients = [buffers.like(p, "gradient", p.data_ptr()) for p in parameters]
    forward, leave, backward = (torch.cuda.CUDAGraph() for _ in range(3))
    with _stand_ins(net) as stand_ins, _into(forward, buffers.pool):
        result = function(*fixed)
    tensors = find(result, Tensor)
    outputs = [buffers.like(t, "output", i) for i, t in enumerate(tensors)]
    entering = [buffers.like(t, "output gradient", i) for i, t in enumerate(tensors)]
    with _into(leave, buffers.pool):  # apart from `forward`, as shapes were not known before
        for target, source in zip(outputs, tensors):
            target.copy_(source.detach())
    ways = [(t, g) for t, g in zip(tensors, entering) if t.requires_grad]
    with _into(backward, buffers.pool):
        found = torch.autograd.grad(
            [t for t, _ in ways],
            [stand_ins[p] for p in parameters],
            [g for _, g in ways],
            allow_unused=True,
        )
        reached = [(g, f) for g, f in zip(gradients, found) if f is not None]
        torch._foreach_copy_([g for g, _ in reached], [f for _, f in reached])
    return Captured(
        forward=(forward, leave),
        backward=backward,
        inputs=fixed,
        outputs=outputs,
        fixed=[i for i, t in enumerate(tensors) if not t.requires_grad],
        entering=entering,
        parameters=parameters,
        gradients=[None if f is None else g for g, f in zip(gradients, found)],
        structure=map_structure(result, Tensor, lambda _: Place()),
        kept=kept,
    )


@contextmanager
def _into(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    # Threads that pin memory for the next batch, or that watch NCCL, go on meanwhile. Weights that
    # autocast has converted must not be kept: their memory is the pool's.
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    recording = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    with recording, torch.autocast("cuda", dtype, enabled, cache_enabled=False):
        yield


@contextmanager
def _stand_ins(net: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Each parameter of `net`, in its place meanwhile another tensor over the same memory.

    What autograd keeps of a parameter belongs to the stream that first used it and lives as long as
    any loss does; a capture may have no part in that.
    """
    stand_ins = {p: p.detach().requires_grad_(p.requires_grad) for p in net.parameters()}
    own = [(module, dict(module._parameters)) for module in net.modules()]
    for module, parameters in own:
        module._parameters.update({k: stand_ins[p] for k, p in parameters.items() if p is not None})
    try:
        yield stand_ins
    finally:
        for module, parameters in own:
            module._parameters.update(parameters)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, captured: Captured, ticket: Ticket, inputs: tuple[Tensor, ...], *parameters
    ) -> tuple[Tensor, ...]:
        ctx.captured, ctx.ticket = captured, ticket
        ctx.set_materialize_grads(False)
        for buffer, x in zip(captured.inputs, inputs):
            buffer.copy_(x)
        for graph in captured.forward:
            graph.replay()
        outputs = tuple(x.clone() for x in captured.outputs)  # the buffers are for the next pass
        ctx.mark_non_differentiable(*(outputs[i] for i in captured.fixed))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *entering: Tensor | None) -> tuple:
        captured, ticket = ctx.captured, ctx.ticket
        if ticket.done:
            raise RuntimeError(
                "backward through a captured network a second time: what it needs is gone; call "
                "the model again, or train without TrainingGraphs"
            )
        ticket.done = True
        for buffer, x in zip(captured.entering, entering):
            buffer.zero_() if x is None else buffer.copy_(x)
        for parameter, gradient in zip(captured.parameters, captured.gradients):
            if gradient is not None and _same_memory(parameter.grad, gradient):
                parameter.grad = parameter.grad.clone()
        captured.backward.replay()
        # New tensors over the same memory: autograd makes them `.grad` without a copy.
        return (None, None, None, *(g if g is None else g.detach() for g in captured.gradients))


def _same_memory(x: Tensor | None, y: Tensor) -> bool:
    return x is not None and x.data_ptr() == y.data_ptr()


def layout(x: Tensor) -> Hashable:
    """Two tensors of equal layout can take each other's place in a graph."""
    return (tuple(x.shape), x.stride(), x.dtype, x.device)
