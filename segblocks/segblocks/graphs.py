"""Passes from CUDA graphs: the host launches a forward or backward pass of a network whole.

On blocks a layer is several small launches, and Python between them takes longer than the GPU
does. A pass is captured for each setting that occurs (shape, number of high blocks, precision, …)
and replayed from then on, with the same results to rounding. Passes without gradient, those of
validation, are captured too.
"""

import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .capture import Buffers, Captured, Ticket, backward, capture, layout
from .capturing import CaptureFailed
from .dispatch import current_recorder
from .ops.cudnn import allows_tf32

_hooks = attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_trains, _requires_grad = attrgetter("training"), attrgetter("requires_grad")


class _TooMany(CaptureFailed):
    """Nothing was captured."""


class TrainingGraphs:
    """Captures and replays what networks do on CUDA, in one thread and on one stream: forward and
    backward passes of training, and forward passes under `torch.no_grad` (not `inference_mode`).

    What a network does beside its tensors (counting in Python, printing, deciding by anything but
    shapes) happens when it is captured and not again, and settings of modules (a momentum, a
    dropout rate) are those of that moment. Modules that are exchanged, frozen, switched between
    training and evaluation, or whose weights move in memory are noticed and captured anew; modules
    with hooks run without graphs, and so do networks that cannot be captured, with one warning.

    Gradients of parameters lie in buffers that the next backward pass overwrites; it first copies
    those that are still the `.grad` of a parameter, so accumulating works as ever.

    All graphs of a network share one pool of memory, as large as the largest of them needs, and
    those without gradient another one. While a forward pass waits for its backward pass, others
    with gradient run without graphs. Without gradient a setting is captured when it occurs for the
    second time, as images of validation may be of many sizes.

    What several processes exchange inside a pass, over NCCL or in memory of their GPUs
    (SyncBatchNorm), is part of the graphs. One of them may replay what another one runs as written,
    if all exchange the same in the same order and NCCL_GRAPH_REGISTER is 0; NCCL's manual promises
    no more than graphs that are captured and launched by all together. `release` the graphs before
    the processes part, which would wait for them.

    Args:
        most: settings to keep graphs of; a network in which more occur trains without, and the
            others of them run without where no gradient is wanted.
        frozen: nothing of the networks but values ever changes, so it is not looked for before each
            pass.
        failed: called when a capture has failed: the CUDA generator of the device is another one
            then, so graphs of others that draw from it are void.
    """

    def __init__(
        self, most: int = 64, frozen: bool = False, failed: Callable[[], None] | None = None
    ):
        self.most, self.frozen, self.failed = most, frozen, failed
        self._of_net: weakref.WeakKeyDictionary[nn.Module, _Graphs] = weakref.WeakKeyDictionary()
        self._without_gradient: weakref.WeakKeyDictionary[nn.Module, _Graphs]
        self._without_gradient = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return TrainingGraphs, (self.most, self.frozen)  # the copy of a network captures for itself

    @staticmethod
    def backward(loss: Tensor) -> None:
        """`loss.backward()`, with fewer steps of Python if `loss` came out of a graph, as that of
        an `objective` does. Gradients become `.grad` or are added to it, as ever.
        DistributedDataParallel does not see them: under it, call `loss.backward()`."""
        backward(loss)

    def __call__(
        self,
        net: nn.Module,
        function: Callable,
        inputs: tuple[Tensor, ...],
        setting: Hashable = (),
    ) -> Any:
        """`function(*inputs)`, differentiable in the parameters of `net` and in `inputs`.

        Args:
            net: the modules that `function` runs.
            function: tensors → tensors in nested tuples, lists and dicts.
            inputs: tensors of one device, of any shapes.
            setting: whatever else `function` depends on.
        """
        return self.run(self.prepare(net, inputs), function, setting)

    def prepare(self, net: nn.Module, inputs: tuple[Tensor, ...]) -> "Prepared":
        """Of `__call__` what can be done before function and setting are known; `run` does the
        rest. In between, neither modules nor inputs may change, and nothing else be prepared."""
        if not _can_be_captured(inputs):
            return Prepared(inputs)
        return self._graphs_of(net).prepare(inputs)

    def run(self, prepared: "Prepared", function: Callable, setting: Hashable = ()) -> Any:
        """See `__call__`."""
        inputs, graphs = prepared.inputs, prepared.graphs
        if graphs is None:
            return function(*inputs)
        captured, failed = None, False
        try:
            captured = graphs.find(prepared, function, setting)
        except CaptureFailed as failure:
            failed = True
            if isinstance(failure, _TooMany):
                graphs.drop()
            else:
                self._drop_all()
            if graphs.given_up:  # else a library set itself up: the pass as written sees to that
                does = "trains" if graphs.learns else "is evaluated"
                warnings.warn(
                    f"{type(graphs.parts.net).__name__} {does} without CUDA graphs: {failure}",
                    stacklevel=4,
                )
        if failed:
            torch.cuda.empty_cache()  # of the failed pass, which lived as long as its error
        return function(*inputs) if captured is None else graphs.replay(captured, prepared)

    def _graphs_of(self, net: nn.Module) -> "_Graphs":
        learns = torch.is_grad_enabled()
        known = self._of_net if learns else self._without_gradient
        graphs = known.get(net)
        if graphs is None:
            graphs = known[net] = _Graphs(net, self.most, learns, self.frozen)
        return graphs

    def _drop_all(self) -> None:
        """They draw from a generator that has been replaced."""
        for graphs in self._all():
            graphs.drop()
        if self.failed is not None:
            self.failed()

    def _all(self) -> "list[_Graphs]":
        return [*self._of_net.values(), *self._without_gradient.values()]

    def release(self) -> None:
        """Destroy all graphs, whoever refers to them; what occurs again is captured anew."""
        for graphs in self._all():
            for captured in graphs.captured.values():
                captured.reset()
            graphs.drop()

    def captured(self, net: nn.Module) -> int:
        """Number of settings that `net` has graphs of."""
        found = (self._of_net.get(net), self._without_gradient.get(net))
        return sum(len(graphs.captured) for graphs in found if graphs is not None)


@dataclass(frozen=True)
class Prepared:
    """Inputs of a pass, and what was found out about it.

    Attributes:
        graphs: None: the pass runs as written.
        key: all that a pass depends on but function and setting.
        placed: where the inputs lie for graphs to read; None: nowhere yet.
    """

    inputs: tuple[Tensor, ...]
    graphs: "_Graphs | None" = None
    key: Hashable = None
    placed: Buffers | None = None


class _Graphs:
    """Of one network: those with gradient (`learns`), or those without."""

    def __init__(self, net: nn.Module, most: int, learns: bool, frozen: bool):
        self.most, self.learns = most, learns
        self.parts = Parts(net, frozen)
        self.passed: set[Hashable] = set()  # settings that ran as written
        self.captured: dict[Hashable, Captured] = {}
        self.given_up = False
        self.buffers = Buffers()
        self.waiting: Callable[[], Ticket | None] = lambda: None

    def prepare(self, inputs: tuple[Tensor, ...]) -> Prepared:
        """See TrainingGraphs."""
        waiting = self.waiting()
        if self.given_up or (waiting is not None and not waiting.done):
            return Prepared(inputs)
        parts = self.parts.state()
        if parts is None or (self.learns and not self.parts.requires_grad):
            return Prepared(inputs)
        key = (parts, *((layout(x), x.requires_grad) for x in inputs), _modes())
        if not self.captured or not self.learns:  # of the latter many may run as written
            return Prepared(inputs, self, key)
        self.buffers.place(inputs)
        return Prepared(inputs, self, key, self.buffers)

    def find(self, prepared: Prepared, function: Callable, setting: Hashable) -> Captured | None:
        """The graphs of this setting, captured now if need be; None: run as written.

        Raises:
            CaptureFailed: it cannot be captured; for good if `given_up` is set then.
        """
        key = (setting, prepared.key)
        if key in self.captured:
            return self.captured[key]
        at_once = self.learns and self.passed and not torch.backends.cudnn.benchmark
        if key not in self.passed and not at_once:
            # Libraries set themselves up, and cuDNN tries algorithms out, outside a capture. Not
            # for every setting of training: the memory of such a pass comes on top of the graphs'.
            self.passed.add(key)
            return None
        full = len(self.captured) >= self.most
        if full and not self.learns:
            return None
        try:
            if full:
                self.passed.add(key)
                raise _TooMany(
                    f"more than {self.most} settings occur, each to be captured; round the number "
                    "of high blocks (quantize_percentage)"
                )
            kept = self.parts.everything()
            given = (self.parts.net, function, prepared.inputs, self.buffers, kept)
            self.captured[key] = capture(*given)
        except CaptureFailed:
            self.given_up = key in self.passed
            self.passed.add(key)
            raise
        return self.captured[key]

    def replay(self, captured: Captured, prepared: Prepared) -> Any:
        ticket = Ticket()
        if self.learns:
            self.waiting = weakref.ref(ticket)
        if prepared.placed is not self.buffers:
            self.buffers.place(prepared.inputs)
        return captured.run(prepared.inputs, ticket)

    def drop(self) -> None:
        """Forget all graphs."""
        self.captured.clear()
        self.buffers = Buffers()


class Parts:
    """The modules, parameters and buffers of a network, and whether they are as they were.

    Asked before every pass, so written for few steps: the tree of modules is walked again only when
    a module has other children, and if all are `frozen`, nothing is looked at after the first time.
    """

    def __init__(self, net: nn.Module, frozen: bool = False):
        self._net = weakref.ref(net)  # which owns these graphs as long as it lives
        self._frozen = frozen
        self._below: list[nn.Module] = []
        self._children: list[tuple[int, ...]] = []
        self._last: list[Any] = []
        self._numbers: dict[Hashable, int] = {}
        self._number = -1
        self.requires_grad = False

    @property
    def net(self) -> nn.Module:
        net = self._net()
        assert net is not None, "asked by a pass of this very network"
        return net

    def state(self) -> Hashable | None:
        """Equal for equal parts in equal modes; None where nothing can be captured. Whether any of
        them requires a gradient is then `requires_grad`."""
        if self._frozen and self._number >= 0:
            return self._number
        net = self.net
        modules = [net, *self._below]
        if list(map(_identities, modules)) != self._children:
            modules = list(net.modules())
            self._below = modules[1:]
            self._children = list(map(_identities, modules))
            self._last = []
        if any(map(any, map(_hooks, modules))):
            return None
        tensors = [
            t
            for m in modules
            for held in (m._parameters, m._buffers)
            for t in held.values()
            if t is not None
        ]
        wanted = list(map(_requires_grad, tensors))
        self.requires_grad = True in wanted
        addresses, shapes = map(Tensor.data_ptr, tensors), map(Tensor.size, tensors)
        now = [*map(_trains, modules), *wanted, *map(id, tensors), *addresses, *shapes]
        if now != self._last:
            key = (tuple(self._children), tuple(now))
            self._number = self._numbers.setdefault(key, len(self._numbers))
            self._last = now
        return self._number

    def everything(self) -> list[Any]:
        """What identities in `state` stand for."""
        net = self.net
        return [*self._below, *net.parameters(), *net.buffers()]


def _identities(module: nn.Module) -> tuple[int, ...]:
    """Of its children."""
    return tuple(map(id, module._modules.values()))


def _can_be_captured(inputs: tuple[Tensor, ...]) -> bool:
    return (
        inputs[0].is_cuda
        and not torch.is_inference_mode_enabled()
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and current_recorder() is None
        and not _has_any_global_hook()
        and not torch.cuda.is_current_stream_capturing()
    )


def _modes() -> Hashable:
    """Global settings that a pass depends on."""
    return (
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.cudnn.deterministic,
        allows_tf32(),
        torch.get_float32_matmul_precision(),
    )
