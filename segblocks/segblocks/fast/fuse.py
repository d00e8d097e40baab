"""Turns a recorded program into fewer, larger steps: a convolution with all that surrounds it."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..rules.arguments import pair
from .trace import Node, Program, Ref


@dataclass
class Affine:
    """A batch norm in evaluation: x * scale + shift, per channel, float32."""

    scale: Tensor
    shift: Tensor


@dataclass
class ConvStep:
    """A convolution of 1×1 or 3×3 (padding 1) with what the kernel does around it.

    Attributes:
        source, output: values read and written.
        weight: (COUT, CIN, k, k), batch norm folded in; bias: (COUT,) float32.
        pre: affine and ReLU before it. post: affine and ReLU after everything.
        residual: value added before the ReLU. enlarged: value added after bilinear ×2.
        extra: a value read by a second, 1×1 convolution that is added, with its weight and stride.
        place: index of the last node taken in; the step runs there.
    """

    source: int
    output: int
    weight: Tensor
    bias: Tensor
    stride: int
    place: int
    pre: Affine | None = None
    post: Affine | None = None
    relu: bool = False
    residual: int | None = None
    enlarged: int | None = None
    extra: int | None = None
    extra_weight: Tensor | None = None
    extra_stride: int = 1
    nodes: list[Node] = field(default_factory=list)

    @property
    def inputs(self) -> list[int]:
        found = (self.source, self.residual, self.enlarged, self.extra)
        return [value for value in found if value is not None]


@dataclass
class PoolStep:
    """Max pooling 3×3, stride 2, padding 1."""

    source: int
    output: int
    place: int

    @property
    def inputs(self) -> list[int]:
        return [self.source]


@dataclass
class StemStep:
    """The first convolution, 7×7 or 3×3 with stride 2 on three channels, batch norm and ReLU."""

    output: int
    weight: Tensor
    bias: Tensor
    relu: bool
    place: int

    @property
    def inputs(self) -> list[int]:
        return []


@dataclass
class PlainStep:
    """Anything else: the function itself, on block tensors."""

    node: Node
    place: int

    @property
    def inputs(self) -> list[int]:
        return self.node.inputs


Step = ConvStep | PoolStep | StemStep | PlainStep


def fuse(program: Program) -> list[Step]:
    """The steps of a program, in an order in which their inputs exist."""
    return _Fuser(program).run()


def fold(weight: Tensor, bias: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Batch norm after a convolution, folded into its parameters."""
    scale = affine.scale.to(weight.dtype)
    return weight * scale.view(-1, 1, 1, 1), bias * affine.scale + affine.shift


class _Fuser:
    def __init__(self, program: Program):
        self.program = program
        self.taken: set[int] = set()
        self.index = {id(node): i for i, node in enumerate(program.nodes)}
        self.producer = {value: node for node in program.nodes for value in node.outputs}

    def run(self) -> list[Step]:
        steps: list[Step] = []
        for node in self.program.nodes:
            if node.name == "conv2d" and id(node) not in self.taken:
                step = self._stem(node) or self._conv(node)
                if step is not None:
                    steps.append(step)
        for i, node in enumerate(self.program.nodes):
            if id(node) in self.taken:
                continue
            steps.append(self._pool(node, i) or PlainStep(node, i))
        return sorted(steps, key=lambda step: step.place)

    # -- reading nodes ---------------------------------------------------------------------------

    def _sole_user(self, value: int) -> Node | None:
        users = self.program.users(value)
        if len(users) != 1 or users[0].inputs.count(value) != 1 or self.program.is_output(value):
            return None
        return users[0] if id(users[0]) not in self.taken else None

    def _conv_call(self, node: Node) -> tuple | None:
        """(weight, bias, stride) of a convolution that the kernels can do, in float32."""
        bound = _bind(node, "input weight bias stride padding dilation groups".split())
        weight, stride = bound["weight"], pair(bound.get("stride", 1))
        kernel, padding = tuple(weight.shape[2:]), bound.get("padding", 0)
        if isinstance(padding, str):
            return None
        square = kernel[0] == kernel[1] and stride[0] == stride[1] and stride[0] in (1, 2)
        centred = pair(padding) == (kernel[0] // 2,) * 2
        plain = pair(bound.get("dilation", 1)) == (1, 1) and bound.get("groups", 1) == 1
        if not (square and centred and plain) or not isinstance(bound["input"], Ref):
            return None
        bias = bound.get("bias")
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return weight.float(), bias.float(), stride[0]

    def _affine(self, node: Node | None) -> Affine | None:
        """A batch norm in evaluation."""
        if node is None or node.name != "batch_norm":
            return None
        names = "input running_mean running_var weight bias training momentum eps".split()
        bound = _bind(node, names)
        if bound.get("training"):
            return None
        mean, variance = bound["running_mean"].double(), bound["running_var"].double()
        scale = (variance + bound.get("eps", 1e-5)).rsqrt()
        if bound.get("weight") is not None:
            scale = scale * bound["weight"].double()
        shift = -mean * scale
        if bound.get("bias") is not None:
            shift = shift + bound["bias"].double()
        return Affine(scale.float(), shift.float())

    # -- patterns --------------------------------------------------------------------------------

    def _stem(self, node: Node) -> StemStep | None:
        call = self._conv_call(node)
        if call is None or node.inputs != [0] or call[0].shape[1] != 3 or call[2] != 2:
            return None
        if (
            len(self.program.users(0)) != 1
            or call[0].shape[2] not in (3, 7)
            or call[0].shape[0] % 8
        ):
            return None
        step = ConvStep(0, node.outputs[0], *call, self._take(node))
        self._absorb_after(step, only_activation=True)
        return StemStep(step.output, step.weight, step.bias, step.relu, step.place)

    def _conv(self, node: Node) -> ConvStep | None:
        call = self._conv_call(node)
        if call is None:
            return None
        weight, _, stride = call
        if weight.shape[2] not in (1, 3) or weight.shape[1] % 64 or weight.shape[0] % 8:
            padded = weight.shape[2] == 1 and weight.shape[1] % 64 == 0
            if not padded or not self.program.is_output(node.outputs[0]):
                return None
        if weight.shape[2] == 1 and stride != 1:
            return None
        step = ConvStep(node.inputs[0], node.outputs[0], *call, self._take(node))
        if weight.shape[2] == 1:
            self._absorb_before(step)
        self._absorb_after(step)
        return step

    def _absorb_before(self, step: ConvStep) -> None:
        """relu(batch_norm(x)) in front of a 1×1 convolution, when nobody else reads it."""
        relu = self.producer.get(step.source)
        if relu is None or not _is_relu(relu) or self._sole_user_ignoring(step.source, step):
            return
        norm = self.producer.get(relu.inputs[0])
        affine = self._affine(norm)
        if affine is None or len(self.program.users(relu.inputs[0])) != 1:
            return
        if id(norm) in self.taken or id(relu) in self.taken:
            return
        step.pre, step.source = affine, norm.inputs[0]
        self._take(relu)
        self._take(norm)

    def _sole_user_ignoring(self, value: int, step: ConvStep) -> bool:
        """True if someone besides the step's own convolution reads `value`."""
        return len(self.program.users(value)) != 1 or self.program.is_output(value)

    def _absorb_after(self, step: ConvStep, only_activation: bool = False) -> None:
        node = self._sole_user(step.output)
        affine = self._affine(node)
        if affine is not None:
            step.weight, step.bias = fold(step.weight, step.bias, affine)
            node = self._advance(step, node)
        adds = not only_activation and node is not None and _is_add(node)
        if adds and self._absorb_addend(step, node):
            node = self._advance(step, node)
        if node is not None and _is_relu(node):
            step.relu = True
            node = self._advance(step, node)
        affine = None if only_activation else self._affine(node)
        if affine is not None:
            relu = self._sole_user(node.outputs[0])
            if relu is not None and _is_relu(relu):
                step.post = affine
                self._advance(step, node)
                self._advance(step, relu)

    def _advance(self, step: ConvStep, node: Node) -> Node | None:
        step.place = max(step.place, self._take(node))
        step.output = node.outputs[0]
        return self._sole_user(step.output)

    def _absorb_addend(self, step: ConvStep, add: Node) -> bool:
        others = [value for value in add.inputs if value != step.output]
        if len(others) != 1 or len(add.inputs) != 2:
            return False
        other = others[0]
        maker = self.producer.get(other)
        alone = self._sole_user(other) is add
        if alone and maker is not None and self._is_double(maker):
            step.enlarged = maker.inputs[0]
            self._take(maker)
            return True
        if alone and step.weight.shape[2] == 3 and self._absorb_shortcut(step, maker):
            return True
        step.residual = other
        return True

    def _absorb_shortcut(self, step: ConvStep, maker: Node | None) -> bool:
        """A 1×1 convolution (with batch norm) on the other side of the addition."""
        affine = self._affine(maker)
        conv = self.producer.get(maker.inputs[0]) if affine is not None else maker
        if conv is None or conv.name != "conv2d" or id(conv) in self.taken:
            return False
        call = self._conv_call(conv)
        if call is None or call[0].shape[2] != 1 or call[0].shape[1] % 64:
            return False
        if affine is not None and len(self.program.users(conv.outputs[0])) != 1:
            return False
        weight, bias, step.extra_stride = call
        if affine is not None:
            weight, bias = fold(weight, bias, affine)
            self._take(maker)
        step.extra, step.extra_weight = conv.inputs[0], weight
        step.bias = step.bias + bias
        self._take(conv)
        return True

    def _is_double(self, node: Node) -> bool:
        """Bilinear ×2, align_corners=False."""
        if node.name != "interpolate" or len(node.inputs) != 1:
            return False
        grows = self.program.blocks[node.outputs[0]] == 2 * self.program.blocks[node.inputs[0]]
        bound = _bind(node, "input size scale_factor mode align_corners".split())
        return grows and bound.get("mode") == "bilinear"

    def _pool(self, node: Node, place: int) -> PoolStep | None:
        if node.name != "max_pool2d":
            return None
        names = "input kernel_size stride padding dilation ceil_mode return_indices".split()
        bound = _bind(node, names)
        window = (pair(bound["kernel_size"]), pair(bound.get("stride") or bound["kernel_size"]))
        plain = not bound.get("ceil_mode") and pair(bound.get("dilation", 1)) == (1, 1)
        if window != ((3, 3), (2, 2)) or pair(bound.get("padding", 0)) != (1, 1) or not plain:
            return None
        if self.program.channels[node.inputs[0]] % 8:
            return None
        return PoolStep(node.inputs[0], node.outputs[0], place)

    def _take(self, node: Node) -> int:
        self.taken.add(id(node))
        return self.index[id(node)]


def _bind(node: Node, names: list[str]) -> dict[str, Any]:
    return dict(zip(names, node.args), **node.kwargs)


def _is_relu(node: Node) -> bool:
    return node.name in ("relu", "relu_")


def _is_add(node: Node) -> bool:
    return node.name in ("add", "__add__", "__iadd__", "add_", "__radd__") and "alpha" not in (
        node.kwargs
    )
