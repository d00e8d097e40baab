"""Records what the function of a dense excursion (`no_blocks`) does, so that it can be fused."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..structure import find, map_structure
from .trace import Node, Ref

# What may be asked of a tensor without looking at its values.
_ABOUT = {
    *("__get__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous"),
    *("is_floating_point", "ndimension", "nelement", "numel", "size", "storage_offset", "stride"),
}
# Calls whose result is the same every time, with no tensor given.
_FACTORIES = {"arange", "eye", "full", "linspace", "ones", "scalar_tensor", "tensor", "zeros"}


@dataclass
class DenseProgram:
    """A recorded function of one dense tensor, value 0, that returns one.

    Attributes:
        nodes: the calls, in order, as functions that leave their arguments as they are.
        shapes, dtypes: of each value.
        output: the value returned.
    """

    nodes: list[Node] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    output: int = 0


def record_dense(function: Callable, example: Tensor, own: set[int]) -> DenseProgram | None:
    """Run `function` once and note its calls; None where a recording would not say it all.

    That is where values of the tensor decide what happens, where a tensor comes from elsewhere,
    where something is written through a view, or where anything but one tensor is returned.

    Args:
        example: (N, C, H, W) of the shape, dtype and device that it will be called with.
        own: storages (their addresses) of the network's parameters and buffers.
    """
    # In inference mode tensors do not count their changes, by which in-place calls are found.
    with torch.inference_mode(False), torch.no_grad(), _Recorder(example.clone(), own) as recorder:
        result = function(recorder.example)
    if recorder.incomplete or not isinstance(result, Tensor) or id(result) not in recorder.values:
        return None
    recorder.program.output = recorder.values[id(result)]
    return recorder.program


class _Recorder(TorchFunctionMode):
    """Notes every torch function; values are told apart by the identity of the tensor object."""

    def __init__(self, example: Tensor, own: set[int]):
        super().__init__()
        self.program = DenseProgram()
        self.values: dict[int, int] = {}
        self.incomplete = False
        self.example = example
        self._own = own
        self._alive: list[Tensor] = []
        self._constants: set[int] = set()
        self._add(example)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = find((args, kwargs), Tensor)
        noted = map_structure((args, kwargs), Tensor, self._note)
        before = [_version(x) for x in given]
        result = func(*args, **kwargs)
        written = [x for x, version in zip(given, before) if _version(x) != version]
        name = getattr(func, "__name__", type(func).__name__)
        made = find(result, Tensor)
        if written:
            alone = len(written) == 1 and bool(args) and written[0] is args[0] is result
            self._write(name, func, noted, result if alone else None)
        elif not made:
            self.incomplete |= bool(given) and name not in _ABOUT
        elif self._is_constant(name, noted, given):
            self._alive += made
            self._constants.update(id(x) for x in made)
        elif any(id(x) not in self.values for x in made):
            self._record(name, func, noted, result)
        return result

    def _note(self, x: Tensor) -> Any:
        """A reference to a value; constants, parameters and buffers stay what they are."""
        if id(x) in self.values:
            return Ref(self.values[id(x)])
        known = id(x) in self._constants or x.untyped_storage().data_ptr() in self._own
        self.incomplete |= not known
        return x

    def _is_constant(self, name: str, noted: tuple, given: list[Tensor]) -> bool:
        """Whether a call makes the same at every run, from shapes and parameters alone."""
        if find(noted, Ref) or "rand" in name or name in ("bernoulli", "dropout", "multinomial"):
            return False
        return bool(given) or name in _FACTORIES

    def _add(self, x: Tensor) -> Ref:
        value = len(self.program.shapes)
        self.program.shapes.append(tuple(x.shape))
        self.program.dtypes.append(x.dtype)
        self.values[id(x)] = value
        self._alive.append(x)  # so that no other tensor gets its identity
        return Ref(value)

    def _record(self, name: str, func: Callable, noted: tuple, result: Any) -> None:
        inputs = [ref.value for ref in find(noted, Ref)]

        def produce(x: Tensor) -> Ref:
            known = self.values.get(id(x))
            return self._add(x) if known is None else Ref(known)

        made = map_structure(result, Tensor, produce)
        outputs = [ref.value for ref in find(made, Ref)]
        self.program.nodes.append(Node(name, func, *noted, inputs, outputs, made))

    def _write(self, name: str, func: Callable, noted: tuple, written: Tensor | None) -> None:
        """An in-place call on its first argument makes a new value of the same tensor object."""
        if written is None or id(written) not in self.values or self._is_shared(written):
            self.incomplete = True
            return
        del self.values[id(written)]
        self._record(name, partial(_call_on_copy, func), noted, written)

    def _is_shared(self, x: Tensor) -> bool:
        """Whether another tensor would see a change of this one."""
        own = x.untyped_storage().data_ptr()
        others = (y for y in self._alive if y is not x)
        return any(y.untyped_storage().data_ptr() == own for y in others)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _call_on_copy(function: Callable, /, *args, **kwargs) -> Any:
    first, *rest = args
    return function(first.clone(), *rest, **kwargs)
