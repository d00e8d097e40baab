"""Records what a network does to blocks: a flat list of torch functions with their arguments.

The network runs once, eagerly, on a real image; every rule that is applied and every dense
excursion is noted. So control flow may depend on shapes, but must not depend on pixel values.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dispatch import RECORDER, RULES, apply_rule
from ..structure import find, leaves, map_structure
from ..tensor import DualResTensor, Padding


@dataclass(frozen=True)
class Ref:
    """Stands for a block tensor in recorded arguments."""

    value: int


@dataclass
class Node:
    """One recorded call, as a function that leaves its arguments as they are.

    Attributes:
        name: the rule's name, or "no_blocks" for a dense excursion; "pad + <name>" where `F.pad`
            came before it.
        function, args, kwargs: the call, with Ref in place of block tensors.
        inputs: values among the arguments; outputs: values it makes, in order.
        result: the structure it returned, with Ref in place of block tensors.
    """

    name: str
    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    inputs: list[int]
    outputs: list[int]
    result: Any


@dataclass
class Program:
    """A recorded network.

    Attributes:
        nodes: the calls, in order.
        blocks, channels, layouts, dtypes: of each value; value 0 is the image.
        output: what the network returned, with Ref in place of block tensors.
        obstacle: why replaying the nodes would not give the network's output; None if it does.
    """

    nodes: list[Node] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    output: Any = None
    obstacle: str | None = None

    def users(self, value: int) -> list[Node]:
        return [node for node in self.nodes if value in node.inputs]

    def is_output(self, value: int) -> bool:
        return Ref(value) in find(self.output, Ref)


class Recorder:
    """Turns calls into a Program.

    A value is what a piece of memory holds until a function writes there in place, so values are
    told apart by memory; every tensor is kept alive so that no memory is used twice.
    """

    def __init__(self):
        self.program = Program()
        self._values: dict[tuple, int] = {}
        self._alive: dict[tuple, DualResTensor] = {}
        self._made: dict[int, DualResTensor] = {}
        self._captured: list[tuple[Any, Any]] = []  # cells of closures, what they held

    def add(self, x: DualResTensor) -> Ref:
        """A new value."""
        program, value = self.program, len(self.program.blocks)
        program.blocks.append(x.block)
        program.channels.append(x.stored.shape[1])
        program.layouts.append(x.layout)
        program.dtypes.append(x.dtype)
        self._values[_memory(x)] = value
        self._alive[_memory(x)] = self._made[id(x)] = x
        return Ref(value)

    def ref(self, x: DualResTensor, reader: str) -> Ref:
        """The value that a block tensor holds."""
        found = self._values.get(_memory(x))
        if found is None:
            self.obstruct(f"'{reader}' reads {_UNKNOWN}")
            return self.add(x)
        return Ref(found)

    def record(self, name: str, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """Note one call that has just been made."""
        made = find(result, DualResTensor)
        if name == "no_blocks":
            self._look_into(function.__wrapped__, result)
        if all(id(x) in self._made or x.padding for x in made):
            # Noted by a rule that this one called, the argument itself, or F.pad, which the
            # padded tensor remembers.
            return
        if "out" in kwargs:
            self.obstruct(f"'{name}' writes to out=")
        given = find((args, kwargs), DualResTensor)
        noted = map_structure((args, kwargs), DualResTensor, lambda x: self.ref(x, name))
        inputs = [ref.value for ref in find(noted, Ref)]
        written = given[0] if _is_in_place(name, kwargs) else None
        if written is None and all(_memory(x) in self._values for x in made):
            self._made.update((id(x), x) for x in made)
            return  # another view of what is known: F.dropout in evaluation, say

        def produce(x: DualResTensor) -> Ref:
            known = None if written is not None else self._values.get(_memory(x))
            self._made[id(x)] = x
            return self.add(x) if known is None else Ref(known)

        if name in RULES:  # a method of Tensor does not take blocks by itself
            function = partial(_call_rule, name, function)
        noted_result = map_structure(result, DualResTensor, produce)
        outputs = [ref.value for ref in find(noted_result, Ref)]
        if written is not None:
            self._forget_views(written)
            function, noted = _without_writing(function, *noted)
        padding = next((x.padding for x in given if x.padding), None)
        if padding is not None:
            name, function = f"pad + {name}", partial(_call_padded, padding, function)
        node = Node(name, function, *noted, inputs, outputs, noted_result)
        self.program.nodes.append(node)

    def _look_into(self, function: Callable, result: Any) -> None:
        """What a function of dense tensors gives away, and what it has of its own."""
        if any(isinstance(leaf, Tensor) for leaf in leaves(result)):
            self.obstruct("'no_blocks' returns a dense tensor, and what becomes of it is not seen")
        for cell in getattr(function, "__closure__", None) or ():
            held = _content(cell)
            if held is not _EMPTY:
                self._captured.append((cell, held))

    def finish(self, output: Any) -> None:
        """Note what the network returned."""
        if any(_content(cell) is not held for cell, held in self._captured):
            self.obstruct(
                "a function in 'no_blocks' reads a variable that changes later (a loop's, say); "
                "bind it by a default argument"
            )
        self.program.output = map_structure(
            output, DualResTensor, lambda x: self.ref(x, "the network's output")
        )

    def _forget_views(self, written: DualResTensor) -> None:
        """What else shares memory with a tensor that was written to holds no known value."""
        for memory, other in self._alive.items():
            if memory != _memory(written) and _overlap(other.stored, written.stored):
                self._values.pop(memory, None)

    def obstruct(self, reason: str) -> None:
        """Note why replaying would not give what the network gives; the first reason counts."""
        self.program.obstacle = self.program.obstacle or reason


_UNKNOWN = "blocks made out of sight, or a view of blocks that were changed in place since"
_EMPTY = object()
_IN_PLACE = tuple(f"__i{name}__" for name in "add sub mul truediv pow and or".split())


def _content(cell: Any) -> Any:
    """What a closure's cell holds; _EMPTY before its variable is set, and once it is deleted."""
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _is_in_place(name: str, kwargs: dict[str, Any]) -> bool:
    method = name.endswith("_") and not name.endswith("__")
    return method or name in _IN_PLACE or bool(kwargs.get("inplace"))


def _without_writing(
    function: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[Callable, tuple]:
    """An in-place call as one that leaves its first argument as it is."""
    if kwargs.get("inplace"):
        return function, (args, {**kwargs, "inplace": False})
    return partial(_call_on_copy, function), (args, kwargs)


def _call_rule(name: str, function: Callable, /, *args, **kwargs) -> Any:
    return apply_rule(function, args, kwargs, name)


def _call_on_copy(function: Callable, /, *args, **kwargs) -> Any:
    x, *rest = args or (kwargs.pop("input"),)
    return function(x.like(x.stored.clone()), *rest, **kwargs)


def _call_padded(padding: Padding, function: Callable, /, *args, **kwargs) -> Any:
    def pad(x: DualResTensor) -> DualResTensor:
        return DualResTensor(x.stored, x.grid, x.block, padding=padding)

    args, kwargs = map_structure((args, kwargs), DualResTensor, pad)
    return function(*args, **kwargs)


def _memory(x: DualResTensor) -> tuple:
    """Where a block tensor's pixels lie, and how they are read."""
    pixels = x.stored
    return pixels.data_ptr(), pixels.shape, pixels.stride(), pixels.dtype, x.block, x.layout


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two pixel buffers share memory; two channel ranges of one buffer do not."""
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    if a.stride() != b.stride() or a.stride(1) != 1:
        return True
    pitch = a.stride(0)
    first, second = a.storage_offset() % pitch, b.storage_offset() % pitch
    return first < second + b.shape[1] and second < first + a.shape[1]


@contextmanager
def recording():
    """Collect the calls made on block tensors in this context."""
    recorder = Recorder()
    token = RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        RECORDER.reset(token)
