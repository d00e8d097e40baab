"""Records what a network does to blocks: a flat list of torch functions with their arguments.

The network runs once, eagerly, on a real image; every rule that is applied and every dense
excursion is noted. So control flow may depend on shapes, but must not depend on pixel values.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..dispatch import RECORDER
from ..tensor import DualResTensor


@dataclass(frozen=True)
class Ref:
    """Stands for a block tensor in recorded arguments."""

    value: int


@dataclass
class Node:
    """One recorded call.

    Attributes:
        name: the rule's name, or "no_blocks" for a dense excursion.
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
    """A recorded network. `blocks[v]` and `channels[v]` describe value v; value 0 is the image."""

    nodes: list[Node] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    output: Any = None

    def users(self, value: int) -> list[Node]:
        return [node for node in self.nodes if value in node.inputs]

    def is_output(self, value: int) -> bool:
        found = []
        map_structure(self.output, Ref, lambda ref: found.append(ref.value))
        return value in found


def map_structure(value: Any, kind: type, function: Callable) -> Any:
    """Replace every `kind` in nested tuples, lists and dicts."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return type(value)((k, map_structure(v, kind, function)) for k, v in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_structure(v, kind, function) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_structure(v, kind, function) for v in value)
    return value


class Recorder:
    """Turns calls into a Program; holds every block tensor so that identities stay unique."""

    def __init__(self):
        self.program = Program()
        self._values: dict[int, int] = {}
        self._alive: list[DualResTensor] = []

    def add(self, x: DualResTensor) -> Ref:
        value = len(self.program.blocks)
        self.program.blocks.append(x.block)
        self.program.channels.append(x.pixels.shape[1])
        self.program.layouts.append(x.layout)
        self._values[id(x)] = value
        self._alive.append(x)
        return Ref(value)

    def ref(self, x: DualResTensor) -> Ref:
        found = self._values.get(id(x))
        return self.add(x) if found is None else Ref(found)

    def record(self, name: str, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        inputs: list[int] = []

        def note(x: DualResTensor) -> Ref:
            ref = self.ref(x)
            inputs.append(ref.value)
            return ref

        noted_args = map_structure(args, DualResTensor, note)
        noted_kwargs = map_structure(kwargs, DualResTensor, note)
        outputs: list[int] = []

        def produce(x: DualResTensor) -> Ref:
            # A function may return its argument (F.dropout in evaluation, say).
            ref = Ref(self._values[id(x)]) if id(x) in self._values else self.add(x)
            outputs.append(ref.value)
            return ref

        noted_result = map_structure(result, DualResTensor, produce)
        if not outputs or all(value in inputs for value in outputs):
            return
        self.program.nodes.append(
            Node(name, function, noted_args, noted_kwargs, inputs, outputs, noted_result)
        )
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
        if in_place or noted_kwargs.get("inplace") is True:
            # Whoever still holds the argument sees the new pixels.
            self._values[id(args[0])] = outputs[0]

    def finish(self, output: Any) -> None:
        """Note what the network returned."""
        self.program.output = map_structure(output, DualResTensor, self.ref)


_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__")


@contextmanager
def recording():
    """Collect the calls made on block tensors in this context."""
    recorder = Recorder()
    token = RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        RECORDER.reset(token)
