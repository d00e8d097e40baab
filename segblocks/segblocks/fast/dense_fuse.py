"""Turns a recorded dense excursion into fewer steps: 1×1 convolutions with all that surrounds them.

Networks leave their blocks for the context of the whole picture: small maps, many small calls.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ..rules.arguments import pair
from .dense_trace import DenseProgram
from .fuse import affine_of, bind, fold, is_relu, wide
from .small_conv import MOST_PARTS
from .steps import Affine
from .trace import Node, Ref


@dataclass
class PointStep:
    """A 1×1 convolution of values side by side along the channels.

    Attributes:
        sources: values read; one of another size than the output is resized to it bilinearly.
        parts: channels of each.
        output: value written; size: its height and width.
        weight: (COUT, CIN, 1, 1), bias: (COUT,); in float32 or wider.
        pre: affine and ReLU before it. relu: after it.
        place: index of the last node taken in.
    """

    sources: list[int]
    parts: list[int]
    output: int
    size: tuple[int, int]
    weight: Tensor
    bias: Tensor
    place: int
    pre: Affine | None = None
    relu: bool = False

    @property
    def inputs(self) -> list[int]:
        return self.sources


@dataclass
class PooledStep:
    """1×1 convolutions of averages of one value over bins, one for each `level`.

    A level is a PointStep whose only source is the averages, its `size` the number of bins.
    """

    source: int
    levels: list[PointStep] = field(default_factory=list)
    place: int = 0

    @property
    def inputs(self) -> list[int]:
        return [self.source]


@dataclass
class CallStep:
    """Anything else: the function itself."""

    node: Node
    place: int

    @property
    def inputs(self) -> list[int]:
        return self.node.inputs


DenseStep = PointStep | PooledStep | CallStep


def fuse_dense(program: DenseProgram) -> list[DenseStep]:
    """The steps of a dense program, in an order in which their inputs exist."""
    return _DenseFuser(program).run()


class _DenseFuser:
    def __init__(self, program: DenseProgram):
        self.program = program
        self.taken: set[int] = set()
        self.index = {id(node): i for i, node in enumerate(program.nodes)}
        self.producer = {v: node for node in program.nodes for v in node.outputs}

    def run(self) -> list[DenseStep]:
        steps: list[DenseStep] = []
        pooled: dict[int, PooledStep] = {}
        for node in self.program.nodes:
            step = self._point(node)
            if step is None:
                continue
            pool = self._bins(step)
            if pool is None:
                steps.append(step)
                continue
            # All levels run where the first does, as they read nothing but their source.
            source = pool.inputs[0]
            if source not in pooled or len(pooled[source].levels) == MOST_PARTS:
                pooled[source] = PooledStep(source, [], self._take(pool))
                steps.append(pooled[source])
            pooled[source].levels.append(step)
            self._take(pool)
        for i, node in enumerate(self.program.nodes):
            if id(node) not in self.taken:
                steps.append(CallStep(node, i))
        return sorted(steps, key=lambda step: step.place)

    def _take(self, node: Node) -> int:
        self.taken.add(id(node))
        return self.index[id(node)]

    def _sole_user(self, value: int) -> Node | None:
        users = [node for node in self.program.nodes if value in node.inputs]
        alone = len(users) == 1 and users[0].inputs.count(value) == 1
        return users[0] if alone and value != self.program.output else None

    def _made_for_one(self, value: int) -> Node | None:
        """Who makes a value that only one call reads."""
        node = self.producer.get(value)
        alone = node is not None and len(node.outputs) == 1 and self._sole_user(value) is not None
        return node if alone else None

    def _point(self, node: Node) -> PointStep | None:
        """A 1×1 convolution, what it reads and what is done with it."""
        names = "input weight bias stride padding dilation groups".split()
        bound = bind(node, names) if node.name == "conv2d" else {}
        if len(node.inputs) != 1 or not isinstance(bound.get("input"), Ref):
            return None
        weight, bias = bound["weight"], bound.get("bias")
        plain = pair(bound.get("stride", 1)) == (1, 1) and bound.get("groups", 1) == 1
        unpadded = bound.get("padding", 0) in ("valid", "same", 0) or not any(
            pair(bound["padding"])
        )
        shape = self.program.shapes[node.inputs[0]]
        if weight.shape[2:] != (1, 1) or not plain or not unpadded or len(shape) != 4:
            return None
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        output, place = node.outputs[0], self._take(node)
        step = PointStep([], [], output, shape[2:], wide(weight), wide(bias), place)
        self._absorb_after(step)
        source = self._absorb_before(step, node.inputs[0])
        step.sources = self._absorb_cat(source)
        step.parts = [self.program.shapes[value][1] for value in step.sources]
        return step

    def _absorb_after(self, step: PointStep) -> None:
        node = self._sole_user(step.output)
        affine = affine_of(node)
        if affine is not None:
            step.weight, step.bias = fold(step.weight, step.bias, affine)
            node = self._advance(step, node)
        if node is not None and is_relu(node):
            step.relu = True
            self._advance(step, node)

    def _advance(self, step: PointStep, node: Node) -> Node | None:
        step.place, step.output = self._take(node), node.outputs[0]
        return self._sole_user(step.output)

    def _absorb_before(self, step: PointStep, source: int) -> int:
        """relu(batch_norm(x)); the value that is read then."""
        relu = self._made_for_one(source)
        if relu is None or not is_relu(relu):
            return source
        norm = self._made_for_one(relu.inputs[0])
        affine = affine_of(norm)
        if affine is None or {id(relu), id(norm)} & self.taken:
            return source
        step.pre = affine
        self._take(relu)
        self._take(norm)
        return norm.inputs[0]

    def _absorb_cat(self, source: int) -> list[int]:
        """The values joined along the channels, before they were resized."""
        values, cat = [source], self._made_for_one(source)
        if cat is not None and cat.name in ("cat", "concat", "concatenate"):
            bound = bind(cat, ["tensors", "dim"])
            joined, dim = bound["tensors"], bound.get("dim", 0)
            alike = {self.program.dtypes[value] for value in cat.inputs}
            refs = all(isinstance(x, Ref) for x in joined) and len(joined) <= MOST_PARTS
            if dim in (1, -3) and refs and len(alike) == 1:
                values = [ref.value for ref in joined]
                self._take(cat)
        return [self._unresized(value) for value in values]

    def _unresized(self, value: int) -> int:
        node = self._made_for_one(value)
        if node is None or node.name != "interpolate" or len(node.inputs) != 1:
            return value
        names = "input size scale_factor mode align_corners recompute_scale_factor antialias"
        bound = bind(node, names.split())
        before, after = self.program.shapes[node.inputs[0]], self.program.shapes[value]
        factor = bound.get("scale_factor")
        exact = factor is None or after[2:] == tuple(
            side * f for side, f in zip(before[2:], pair(factor))
        )
        odd = bound.get("align_corners") or bound.get("antialias") or not exact
        if bound.get("mode") != "bilinear" or odd:
            return value
        self._take(node)
        return node.inputs[0]

    def _bins(self, step: PointStep) -> Node | None:
        """The average pooling that alone feeds a step, over bins that cover the map."""
        node = self._made_for_one(step.sources[0]) if len(step.sources) == 1 else None
        if node is None or len(node.inputs) != 1 or len(self.program.shapes[node.inputs[0]]) != 4:
            return None
        if self.program.shapes[step.sources[0]][2:] != tuple(step.size):
            return None  # resized on the way
        if node.name == "adaptive_avg_pool2d":
            return node
        if node.name != "avg_pool2d":
            return None
        names = "input kernel_size stride padding ceil_mode count_include_pad divisor_override"
        bound = bind(node, names.split())
        kernel = pair(bound["kernel_size"])
        stride = pair(bound.get("stride") or kernel)
        height, width = self.program.shapes[node.inputs[0]][2:]
        whole = not (height % kernel[0] or width % kernel[1]) and stride == kernel
        padded = any(pair(bound.get("padding", 0))) or bound.get("divisor_override")
        return node if whole and not padded else None


def last_dense_uses(program: DenseProgram, steps: list[DenseStep]) -> dict[int, int]:
    """For each value the step that reads it last; past the end for what is returned."""
    uses = {value: i for i, step in enumerate(steps) for value in step.inputs}
    return uses | {program.output: len(steps)}
