"""A forward pass of a network as CUDA graphs, and its backward pass; see `graphs` for when."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .capturing import CaptureFailed, cleared_up
from .once import differentiable_once
from .structure import find, leaves, map_structure


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
    _streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    def like(self, x: Tensor, *name: Hashable) -> Tensor:
        """Of this name and of the layout of `x`, the same for all settings."""
        key = (*name, layout(x))
        if key not in self._tensors:
            self._tensors[key] = torch.empty_like(x, requires_grad=False)
        return self._tensors[key]

    def inputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Where graphs read inputs of such layouts."""
        return [self.like(x, "input", i) for i, x in enumerate(inputs)]

    @torch.no_grad()
    def place(self, inputs: Sequence[Tensor]) -> None:
        """Copy inputs to there."""
        for buffer, x in zip(self.inputs(inputs), inputs):
            buffer.copy_(x)

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """To capture on. Memory belongs to a stream, also in a pool, so graphs that share it are
        captured on one; and kernels count by streams, so that of each network is its own."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


@dataclass(frozen=True)
class Captured:
    """The graphs of one setting and the memory that they read and write.

    Attributes:
        forward: its graphs, in order.
        backward: None: captured without gradient.
        inputs: what they read, held here as long as they may.
        constant: numbers of the outputs without gradient.
        output_gradients: what the backward pass reads.
        differentiable: numbers of the inputs with gradient.
        gradients: of those inputs, then of the parameters; None for what no output depends on.
        structure: what the network returns, with a Place for each tensor.
        kept: whatever the setting is told by, so that nothing else gets its identity.
    """

    forward: tuple[torch.cuda.CUDAGraph, ...]
    backward: torch.cuda.CUDAGraph | None
    inputs: list[Tensor]
    outputs: list[Tensor]
    constant: list[int]
    output_gradients: list[Tensor]
    differentiable: list[int]
    parameters: list[Tensor]
    gradients: list[Tensor | None]
    structure: Any
    kept: Any

    def reset(self) -> None:
        """Destroy the graphs. A backward pass that is to come raises."""
        for graph in (*self.forward, self.backward):
            if graph is not None:
                graph.reset()

    def run(self, inputs: tuple[Tensor, ...], ticket: Ticket) -> Any:
        """What the network returns for other inputs of the same layout, which `Buffers.place` has
        placed; with its gradient, if that was captured."""
        for graph in self.forward:  # first, as the device waits
            graph.replay()
        if self.backward is None:
            copies = (x.clone() for x in self.outputs)  # the buffers are for the next pass
            return map_structure(self.structure, Place, lambda _: next(copies))
        given = (*(inputs[i] for i in self.differentiable), *self.parameters)
        outputs = iter(_Replay.apply(self, ticket, *given))
        return map_structure(self.structure, Place, lambda _: next(outputs))


def capture(
    net: nn.Module, function: Callable, inputs: tuple[Tensor, ...], buffers: Buffers, kept: Any
) -> Captured:
    """Capture `function(*inputs)` and, where gradients are recorded, the gradient of its outputs in
    the parameters of `net` and in those inputs that require it.

    Raises:
        CaptureFailed: something in it waits for the device, or is no part of a graph otherwise;
            then the CUDA generator of the device is another one with the same state.
    """
    device = inputs[0].device
    with cleared_up(device, buffers.pool), torch.cuda.device(device):
        return _capture(net, function, inputs, buffers, kept)


def _capture(
    net: nn.Module, function: Callable, inputs: tuple[Tensor, ...], buffers: Buffers, kept: Any
) -> Captured:
    learns = torch.is_grad_enabled()
    fixed = buffers.inputs(inputs)
    differentiable = [i for i, x in enumerate(inputs) if learns and x.requires_grad]
    # Of the same memory, but leaves of what autograd records here.
    own_inputs = [x.detach().requires_grad_(i in differentiable) for i, x in enumerate(fixed)]
    parameters = [p for p in net.parameters() if learns and p.requires_grad]
    gradients = [buffers.like(fixed[i], "input gradient", i) for i in differentiable]
    gradients += [buffers.like(p, "gradient", id(p)) for p in parameters]
    forward, leave, backward = (torch.cuda.CUDAGraph() for _ in range(3))
    into = partial(recorded_in, pool=buffers.pool, stream=buffers.stream(inputs[0].device))
    with stand_ins_of(net) as stand_ins, into(forward):
        result = function(*own_inputs)
    tensors = find(result, Tensor)
    check_outputs(result, tensors, [*own_inputs, *stand_ins.values()])
    outputs = [buffers.like(t, "output", i) for i, t in enumerate(tensors)]
    with into(leave):  # apart from `forward`, as shapes were not known before
        for target, source in zip(outputs, tensors):
            target.copy_(source.detach())
    output_gradients, found = [], []
    if learns:
        output_gradients = [buffers.like(t, "output gradient", i) for i, t in enumerate(tensors)]
        roots = [(t, g) for t, g in zip(tensors, output_gradients) if t.requires_grad]
        # As in a training loop, no autocast for the backward pass: it follows what forward cast.
        with into(backward), torch.autocast("cuda", enabled=False):
            found = torch.autograd.grad(
                [t for t, _ in roots],
                [own_inputs[i] for i in differentiable] + [stand_ins[p] for p in parameters],
                [g for _, g in roots],
                allow_unused=True,
            )
            used = [(g, f) for g, f in zip(gradients, found) if f is not None]
            torch._foreach_copy_([g for g, _ in used], [f for _, f in used])
    return Captured(
        forward=(forward, leave),
        backward=backward if learns else None,
        inputs=fixed,
        outputs=outputs,
        constant=[i for i, t in enumerate(tensors) if not t.requires_grad],
        output_gradients=output_gradients,
        differentiable=differentiable,
        parameters=parameters,
        gradients=[None if f is None else g for g, f in zip(gradients, found)],
        structure=map_structure(result, Tensor, lambda _: Place()),
        kept=kept,
    )


def check_outputs(result: Any, tensors: list[Tensor], leaves_known: list[Tensor]) -> None:
    """Raise CaptureFailed where replaying would leave something out.

    Args:
        leaves_known: those that the graph gives gradients to.
    """
    for value in leaves(result):
        if not isinstance(value, Tensor | bool | int | float | str | None):
            raise CaptureFailed(
                f"it returns a {type(value).__name__}; tensors in tuples, lists and dicts can be "
                "captured"
            )
    if not torch.is_grad_enabled():
        return
    if not any(t.requires_grad for t in tensors):
        raise CaptureFailed("it returns no tensor that depends on its parameters")
    known, seen = {id(t) for t in leaves_known}, set()
    nodes = [t.grad_fn for t in tensors if t.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a leaf's node
        if isinstance(variable, Tensor) and id(variable) not in known:
            raise CaptureFailed(
                "it reaches a parameter otherwise than as an attribute of the network's modules"
            )
        nodes += [following for following, _ in node.next_functions if following is not None]


@contextmanager
def recorded_in(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream
) -> Iterator[None]:
    """What is launched inside goes into `graph` and is not executed."""
    # Threads that pin memory for the next batch, or that watch NCCL, go on meanwhile. Weights that
    # autocast has converted must not be kept: their memory is the pool's.
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    recording = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
    with recording, torch.autocast("cuda", dtype, enabled, cache_enabled=False):
        yield


@contextmanager
def stand_ins_of(net: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
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
        ctx: Any, captured: Captured, ticket: Ticket, *differentiable: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.captured, ctx.ticket = captured, ticket
        ctx.entered = differentiable[: len(captured.differentiable)]
        ctx.set_materialize_grads(False)
        outputs = tuple(x.clone() for x in captured.outputs)  # the buffers are for the next pass
        ctx.mark_non_differentiable(*(outputs[i] for i in captured.constant))
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *entering: Tensor | None) -> tuple:
        of_inputs, of_parameters = _replay_backward(ctx.captured, ctx.ticket, entering)
        # New tensors over the same memory: autograd makes them `.grad` without a copy. Gradients of
        # inputs go on to whoever computed those.
        of_inputs = (g if g is None else g.clone() for g in of_inputs)
        of_parameters = (g if g is None else g.detach() for g in of_parameters)
        return (None, None, *of_inputs, *of_parameters)


def _replay_backward(
    captured: Captured, ticket: Ticket, entering: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """-> the buffers with the gradients of inputs and of parameters."""
    if ticket.done:
        raise RuntimeError(
            "backward through a captured network a second time: what it needs is gone; call "
            "the model again, or train without TrainingGraphs"
        )
    ticket.done = True
    for buffer, x in zip(captured.output_gradients, entering):
        buffer.zero_() if x is None else buffer.copy_(x)
    few = len(captured.differentiable)
    of_inputs, of_parameters = captured.gradients[:few], captured.gradients[few:]
    for parameter, gradient in zip(captured.parameters, of_parameters):
        if gradient is not None and _same_memory(parameter.grad, gradient):
            parameter.grad = parameter.grad.clone()
    captured.backward.replay()
    return of_inputs, of_parameters


def backward(loss: Tensor) -> None:
    """What `loss.backward()` does, with fewer steps of Python where the loss is what a replay has
    returned and no hook of a parameter waits for its gradient."""
    node = loss.grad_fn
    if (
        getattr(node, "_forward_cls", None) is not _Replay
        or loss._backward_hooks
        or loss.numel() != 1
        or torch.is_anomaly_enabled()
        or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in node.captured.parameters)
    ):
        loss.backward()
        return
    entering: list[Tensor | None] = [None] * len(node.captured.outputs)
    entering[loss.output_nr] = torch.ones_like(loss, requires_grad=False)
    with torch.no_grad():
        of_inputs, of_parameters = _replay_backward(node.captured, node.ticket, entering)
        for parameter, gradient in zip(node.captured.parameters, of_parameters):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient.detach()
            else:
                parameter.grad.add_(gradient)
    onward = [(x, g) for x, g in zip(node.entered, of_inputs) if g is not None]
    if onward:
        torch.autograd.backward([x for x, _ in onward], [g.clone() for _, g in onward])


def _same_memory(x: Tensor | None, y: Tensor) -> bool:
    return x is not None and x.data_ptr() == y.data_ptr()


def layout(x: Tensor) -> Hashable:
    """Two tensors of equal layout can take each other's place in a graph."""
    return (tuple(x.shape), x.stride(), x.dtype, x.device)
