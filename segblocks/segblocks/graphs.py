"""Training from CUDA graphs: the host launches a forward or backward pass of a network whole.

On blocks a layer is several small launches, and Python between them takes longer than the GPU
does. A pass is captured for each setting that occurs (shape, number of high blocks, precision, …)
and replayed from then on, with the same results.
"""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .dispatch import current_recorder
from .structure import find, map_structure

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class TrainingGraphs:
    """Captures and replays what a network does in training on CUDA.

    What a network does beside its tensors (counting in Python, printing, deciding by anything but
    shapes) happens when it is captured and not again. Modules that are exchanged, frozen, switched
    between training and evaluation, or whose weights move in memory are noticed and captured anew;
    modules with hooks run without graphs.

    Gradients of parameters lie in buffers that the next backward pass overwrites; it first copies
    those that are still the `.grad` of a parameter, so accumulating works as ever.

    All graphs share one pool of memory, as large as the largest of them needs. While a forward pass
    waits for its backward pass, others run without graphs.

    Args:
        most: settings to keep graphs of; with one more, all are dropped.
    """

    def __init__(self, most: int = 64):
        self.most = most
        self._captured: dict[Hashable, _Captured | None] = {}
        self._buffers: dict[Hashable, Tensor] = {}
        self._pool: Any = None
        self._waiting: Callable[[], _Ticket | None] = lambda: None
        self._started = False

    def __reduce__(self):
        return TrainingGraphs, (self.most,)  # the copy of a network captures for itself

    def __call__(
        self, net: nn.Module, function: Callable, inputs: tuple[Tensor, ...], setting: Hashable = ()
    ) -> Any:
        """`function(*inputs)`, differentiable in the parameters of `net`.

        Args:
            net: the modules that `function` runs.
            function: tensors → tensors in nested tuples, lists and dicts.
            inputs: tensors of one device, of any shapes, without gradient.
            setting: whatever else `function` depends on.
        """
        state = self._state(net, inputs)
        waiting = self._waiting()
        if state is None or (waiting is not None and not waiting.done):
            return function(*inputs)
        if not self._started:  # libraries set themselves up, which cannot be captured
            self._started = True
            return function(*inputs)
        key = (setting, state)
        if key not in self._captured:
            if len(self._captured) >= self.most:
                self._captured.clear()
                self._buffers.clear()
            self._captured[key] = self._capture(net, function, inputs)
        captured = self._captured[key]
        if captured is None:
            return function(*inputs)
        ticket = _Ticket()
        self._waiting = weakref.ref(ticket)
        outputs = iter(_Replay.apply(captured, ticket, inputs, *captured.parameters))
        return map_structure(captured.structure, _Place, lambda _: next(outputs))

    def _state(self, net: nn.Module, inputs: tuple[Tensor, ...]) -> Hashable | None:
        """What a captured pass depends on; None where nothing can be captured."""
        differentiable = torch.is_grad_enabled() and not any(x.requires_grad for x in inputs)
        if not differentiable or not inputs[0].is_cuda:
            return None
        watched = (
            torch.compiler.is_compiling()
            or _get_current_dispatch_mode() is not None
            or current_recorder() is not None
            or _has_any_global_hook()
            or torch.cuda.is_current_stream_capturing()
        )
        modules, parameters = list(net.modules()), list(net.parameters())
        if watched or any(getattr(m, hooks) for m in modules for hooks in _HOOKS):
            return None
        if not any(p.requires_grad for p in parameters):
            return None
        return (
            tuple((id(m), m.training) for m in modules),
            tuple((p.data_ptr(), p.requires_grad) for p in parameters),
            tuple(b.data_ptr() for b in net.buffers()),
            tuple(_layout(x) for x in inputs),
            torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
        )

    def _capture(
        self, net: nn.Module, function: Callable, inputs: tuple[Tensor, ...]
    ) -> "_Captured | None":
        try:
            with torch.cuda.device(inputs[0].device):
                return self._capture_passes(net, function, inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            torch.cuda.synchronize(inputs[0].device)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"{type(net).__name__} trains without CUDA graphs: {reason}", stacklevel=4
            )
            return None

    def _capture_passes(
        self, net: nn.Module, function: Callable, inputs: tuple[Tensor, ...]
    ) -> "_Captured":
        """What outlasts this is allocated outside the pool, so that the next capture finds the pool
        empty."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        fixed = [self._buffer(x, "input", i) for i, x in enumerate(inputs)]
        parameters = [p for p in net.parameters() if p.requires_grad]
        gradients = [self._buffer(p, "gradient", p.data_ptr()) for p in parameters]
        forward, leave, backward = (torch.cuda.CUDAGraph() for _ in range(3))
        with self._into(forward):
            result = function(*fixed)
        tensors = find(result, Tensor)
        outputs = [self._buffer(t, "output", i) for i, t in enumerate(tensors)]
        entering = [self._buffer(t, "output gradient", i) for i, t in enumerate(tensors)]
        with self._into(leave):  # apart from `forward`, as shapes were not known before
            for target, source in zip(outputs, tensors):
                target.copy_(source.detach())
        ways = [(t, g) for t, g in zip(tensors, entering) if t.requires_grad]
        with self._into(backward):
            found = torch.autograd.grad(
                [t for t, _ in ways], parameters, [g for _, g in ways], allow_unused=True
            )
            for target, source in zip(gradients, found):
                if source is not None:
                    target.copy_(source)
        return _Captured(
            forward=(forward, leave),
            backward=backward,
            inputs=fixed,
            outputs=outputs,
            fixed_outputs=[i for i, t in enumerate(tensors) if not t.requires_grad],
            entering=entering,
            parameters=parameters,
            gradients=[None if f is None else g for g, f in zip(gradients, found)],
            structure=map_structure(result, Tensor, lambda _: _Place()),
            modules=list(net.modules()),
        )

    @contextmanager
    def _into(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # Threads that pin memory for the next batch, or that watch NCCL, go on meanwhile. Weights
        # that autocast has converted must not be kept: their memory is the pool's.
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        with capture, torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            yield

    def _buffer(self, like: Tensor, *name: Hashable) -> Tensor:
        """Memory of this name and layout, the same for all settings."""
        key = (*name, _layout(like))
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(like, requires_grad=False)
        return self._buffers[key]


class _Ticket:
    """Of a forward pass, held by its autograd node."""

    done = False  # the backward pass has been


class _Place:
    """Where an output stands in the structure that a network returns."""


@dataclass(frozen=True)
class _Captured:
    """The graphs of one setting and the memory that they read and write.

    Attributes:
        forward: its graphs, in order.
        fixed_outputs: numbers of the outputs without gradient.
        entering: gradients of the outputs.
        gradients: of the parameters; None for those that the outputs do not depend on.
        modules: kept, so that no other gets the identity of one of them.
    """

    forward: tuple[torch.cuda.CUDAGraph, ...]
    backward: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]
    fixed_outputs: list[int]
    entering: list[Tensor]
    parameters: list[Tensor]
    gradients: list[Tensor | None]
    structure: Any
    modules: list[nn.Module]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, captured: _Captured, ticket: _Ticket, inputs: tuple[Tensor, ...], *parameters
    ) -> tuple[Tensor, ...]:
        ctx.captured, ctx.ticket = captured, ticket
        ctx.set_materialize_grads(False)
        for buffer, x in zip(captured.inputs, inputs):
            buffer.copy_(x)
        for graph in captured.forward:
            graph.replay()
        outputs = tuple(x.clone() for x in captured.outputs)  # the buffers are for the next pass
        ctx.mark_non_differentiable(*(outputs[i] for i in captured.fixed_outputs))
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


def _layout(x: Tensor) -> Hashable:
    return (tuple(x.shape), x.stride(), x.dtype, x.device)
