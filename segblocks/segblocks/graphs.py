"""Training from CUDA graphs: the host launches a forward or backward pass of a network whole.

On blocks a layer is several small launches, and Python between them takes longer than the GPU
does. A pass is captured for each setting that occurs (shape, number of high blocks, precision, …)
and replayed from then on, with the same results.
"""

import warnings
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .capture import Buffers, Captured, Ticket, capture, layout
from .dispatch import current_recorder

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class TrainingGraphs:
    """Captures and replays what networks do in training on CUDA.

    What a network does beside its tensors (counting in Python, printing, deciding by anything but
    shapes) happens when it is captured and not again. Modules that are exchanged, frozen, switched
    between training and evaluation, or whose weights move in memory are noticed and captured anew;
    modules with hooks run without graphs.

    Gradients of parameters lie in buffers that the next backward pass overwrites; it first copies
    those that are still the `.grad` of a parameter, so accumulating works as ever.

    All graphs of a network share one pool of memory, as large as the largest of them needs. While
    a forward pass waits for its backward pass, others of that network run without graphs.

    Args:
        most: settings of a network to keep graphs of; with one more, all are dropped.
    """

    def __init__(self, most: int = 64):
        self.most = most
        self._of_net: weakref.WeakKeyDictionary[nn.Module, _Graphs] = weakref.WeakKeyDictionary()

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
        state = _state(net, inputs)
        if state is None:
            return function(*inputs)
        graphs = self._of_net.get(net)
        if graphs is None:  # libraries set themselves up, which cannot be captured
            self._of_net[net] = _Graphs(self.most)
            return function(*inputs)
        return graphs.run(net, function, inputs, (setting, state))

    def captured(self, net: nn.Module) -> int:
        """Number of settings that `net` has graphs of."""
        graphs = self._of_net.get(net)
        return 0 if graphs is None else sum(c is not None for c in graphs.captured.values())


class _Graphs:
    """Of one network."""

    def __init__(self, most: int):
        self.most = most
        self.captured: dict[Hashable, Captured | None] = {}  # None: cannot be
        self.buffers = Buffers()
        self.waiting: Callable[[], Ticket | None] = lambda: None

    def run(
        self, net: nn.Module, function: Callable, inputs: tuple[Tensor, ...], key: Hashable
    ) -> Any:
        waiting = self.waiting()
        if waiting is not None and not waiting.done:
            return function(*inputs)
        if key not in self.captured:
            if len(self.captured) >= self.most:
                self.captured.clear()
                self.buffers = Buffers()
            self.captured[key] = self._try(net, function, inputs)
        captured = self.captured[key]
        if captured is None:
            return function(*inputs)
        ticket = Ticket()
        self.waiting = weakref.ref(ticket)
        return captured.run(inputs, ticket)

    def _try(
        self, net: nn.Module, function: Callable, inputs: tuple[Tensor, ...]
    ) -> Captured | None:
        device = inputs[0].device
        try:
            with torch.cuda.device(device):
                return capture(net, function, inputs, self.buffers)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            torch.cuda.synchronize(device)
            # A capture that fails leaves the generator waiting for its end.
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"{type(net).__name__} trains without CUDA graphs: {reason}", stacklevel=5
            )
            return None


def _state(net: nn.Module, inputs: tuple[Tensor, ...]) -> Hashable | None:
    """What a captured pass depends on; None where nothing can be captured."""
    if not inputs[0].is_cuda or not torch.is_grad_enabled():
        return None
    watched = (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or current_recorder() is not None
        or _has_any_global_hook()
        or torch.cuda.is_current_stream_capturing()
        or any(x.requires_grad for x in inputs)
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
        tuple(layout(x) for x in inputs),
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
    )
