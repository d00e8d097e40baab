"""Turns a recorded program into fewer, larger steps: a convolution with all that surrounds it."""

import math
from typing import Any

import torch
from torch import Tensor

from ..rules.arguments import pair
from .steps import Affine, Convolution, ConvStep, DepthwiseStep, PlainStep, PoolStep, StemStep, Step
from .trace import Node, Program, Ref


def fuse(program: Program) -> list[Step]:
    """The steps of a program, in an order in which their inputs exist."""
    return _Fuser(program).run()


def fold(weight: Tensor, bias: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Batch norm after a convolution, folded into its parameters."""
    scale = affine.scale.to(weight.dtype)
    return weight * scale.view(-1, 1, 1, 1), bias * affine.scale + affine.shift


def affine_of(node: Node | None) -> Affine | None:
    """A batch norm in evaluation."""
    if node is None or node.name != "batch_norm" or len(node.inputs) != 1:
        return None
    names = "input running_mean running_var weight bias training momentum eps".split()
    bound = bind(node, names)
    if bound.get("training"):
        return None
    mean, variance = bound["running_mean"].double(), bound["running_var"].double()
    scale = (variance + bound.get("eps", 1e-5)).rsqrt()
    if bound.get("weight") is not None:
        scale = scale * bound["weight"].double()
    shift = -mean * scale
    if bound.get("bias") is not None:
        shift = shift + bound["bias"].double()
    dtype = torch.promote_types(bound["running_mean"].dtype, torch.float32)
    return Affine(scale.to(dtype), shift.to(dtype))


class _Fuser:
    def __init__(self, program: Program):
        self.program = program
        self.taken: set[int] = set()
        self.index = {id(node): i for i, node in enumerate(program.nodes)}
        self.producer: dict[int, Node] = {}
        for node in program.nodes:
            for value in node.outputs:
                self.producer.setdefault(value, node)

    def run(self) -> list[Step]:
        steps: list[Step] = []
        for node in self.program.nodes:
            if node.name == "conv2d" and id(node) not in self.taken:
                step = self._stem(node) or self._depthwise(node) or self._conv(node)
                if step is not None:
                    steps.append(step)
        for i, node in enumerate(self.program.nodes):
            if id(node) in self.taken:
                continue
            steps.append(self._pool(node, i) or PlainStep(node, i))
        return sorted(steps, key=lambda step: step.place)

    # -- reading nodes ---------------------------------------------------------------------------

    def _read_once(self, value: int) -> bool:
        users = self.program.users(value)
        once = len(users) == 1 and users[0].inputs.count(value) == 1
        return once and not self.program.is_output(value)

    def _sole_user(self, value: int) -> Node | None:
        user = self.program.users(value)[0] if self._read_once(value) else None
        return None if user is None or id(user) in self.taken else user

    def _conv_call(self, node: Node, depthwise: bool = False) -> tuple | None:
        """(weight, bias, stride) of a convolution that the kernels can do."""
        bound = bind(node, "input weight bias stride padding dilation groups".split())
        weight, stride = bound["weight"], pair(bound.get("stride", 1))
        kernel, padding = tuple(weight.shape[2:]), bound.get("padding", 0)
        if isinstance(padding, str):
            return None
        square = kernel[0] == kernel[1] and stride[0] == stride[1] and stride[0] in (1, 2)
        centred = pair(padding) == (kernel[0] // 2,) * 2
        groups = weight.shape[0] if depthwise else 1
        plain = pair(bound.get("dilation", 1)) == (1, 1) and bound.get("groups", 1) == groups
        if not (square and centred and plain) or not isinstance(bound["input"], Ref):
            return None
        bias = bound.get("bias")
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return wide(weight), wide(bias), stride[0]

    # -- patterns --------------------------------------------------------------------------------

    def _stem(self, node: Node) -> StemStep | None:
        call = self._conv_call(node)
        if call is None or node.inputs != [0] or call[0].shape[1] != 3 or call[2] != 2:
            return None
        if self._sole_user(0) is not node or call[0].shape[2] not in (3, 7) or call[0].shape[0] % 8:
            return None
        step = ConvStep(0, node.outputs[0], *call, self._take(node))
        self._absorb_after(step, only_activation=True)
        return StemStep(step.output, step.weight, step.bias, step.relu, step.limit, step.place)

    def _depthwise(self, node: Node) -> DepthwiseStep | None:
        call = self._conv_call(node, depthwise=True)
        channels = self.program.channels[node.inputs[0]]
        if call is None or not 1 < channels == call[0].shape[0] or channels % 8:
            return None
        kernel, stride = call[0].shape[2], call[2]
        block, made = (self.program.blocks[v] for v in (node.inputs[0], node.outputs[0]))
        near = kernel // 2 <= block // 2 and made * stride == block
        if kernel not in (3, 5, 7) or not near:
            return None
        step = DepthwiseStep(node.inputs[0], node.outputs[0], *call, self._take(node))
        self._absorb_after(step, only_activation=True)
        return step

    def _conv(self, node: Node) -> ConvStep | None:
        call = self._conv_call(node)
        if call is None:
            return None
        weight, _, stride = call
        if weight.shape[2] not in (1, 3) or weight.shape[1] % 8 or weight.shape[0] % 8:
            padded = weight.shape[2] == 1 and weight.shape[1] % 8 == 0
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
        if relu is None or not is_relu(relu) or not self._read_once(step.source):
            return
        norm = self.producer.get(relu.inputs[0])
        affine = affine_of(norm)
        if affine is None or not self._read_once(relu.inputs[0]):
            return
        if id(norm) in self.taken or id(relu) in self.taken:
            return
        step.pre, step.source = affine, norm.inputs[0]
        self._take(relu)
        self._take(norm)

    def _absorb_after(self, step: Convolution, only_activation: bool = False) -> None:
        node = self._sole_user(step.output)
        affine = affine_of(node)
        if affine is not None:
            step.weight, step.bias = fold(step.weight, step.bias, affine)
            node = self._advance(step, node)
        adds = not only_activation and node is not None and _is_add(node)
        if adds and self._absorb_addend(step, node):
            node = self._advance(step, node)
        limit = limit_of(node)
        if limit is not None:
            step.relu, step.limit = True, limit
            node = self._advance(step, node)
        affine = None if only_activation else affine_of(node)
        if affine is not None:
            relu = self._sole_user(node.outputs[0])
            if relu is not None and is_relu(relu):
                step.post = affine
                self._advance(step, node)
                self._advance(step, relu)

    def _advance(self, step: Convolution, node: Node) -> Node | None:
        step.place = max(step.place, self._take(node))
        step.output = node.outputs[0]
        return self._sole_user(step.output)

    def _absorb_addend(self, step: ConvStep, add: Node) -> bool:
        others = [value for value in add.inputs if value != step.output]
        if len(others) != 1 or len(add.inputs) != 2:
            return False
        other = others[0]
        if not self._alike(other, step.output):
            return False
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

    def _alike(self, a: int, b: int) -> bool:
        """Whether adding two values neither broadcasts channels nor promotes the type."""
        channels, dtypes = self.program.channels, self.program.dtypes
        return (channels[a], dtypes[a]) == (channels[b], dtypes[b])

    def _absorb_shortcut(self, step: ConvStep, maker: Node | None) -> bool:
        """A 1×1 convolution (with batch norm) on the other side of the addition."""
        affine = affine_of(maker)
        conv = self.producer.get(maker.inputs[0]) if affine is not None else maker
        if conv is None or conv.name != "conv2d" or id(conv) in self.taken:
            return False
        call = self._conv_call(conv)
        if call is None or call[0].shape[2] != 1 or call[0].shape[1] % 64:
            return False
        if affine is not None and not self._read_once(conv.outputs[0]):
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
        bound = bind(node, "input size scale_factor mode align_corners".split())
        return grows and bound.get("mode") == "bilinear"

    def _pool(self, node: Node, place: int) -> PoolStep | None:
        if node.name != "max_pool2d":
            return None
        names = "input kernel_size stride padding dilation ceil_mode return_indices".split()
        bound = bind(node, names)
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


def bind(node: Node, names: list[str]) -> dict[str, Any]:
    """A recorded call's arguments by name, given the names of the positional ones."""
    return dict(zip(names, node.args), **node.kwargs)


def is_relu(node: Node) -> bool:
    """A plain ReLU, in place or not."""
    return node.name in ("relu", "relu_")


def limit_of(node: Node | None) -> float | None:
    """The upper limit of a ReLU, in place or not, infinite for a plain one; None for all else."""
    if node is None:
        return None
    if is_relu(node):
        return math.inf
    if node.name == "relu6":
        return 6.0
    names = {"hardtanh": "min_val max_val", "clamp": "min max"}.get(node.name.removesuffix("_"))
    if names is None:
        return None
    least, most = names.split()
    bound = bind(node, ["input", least, most])
    low, high = bound.get(least, -1.0), bound.get(most, 1.0 if most == "max_val" else math.inf)
    limited = isinstance(low, int | float) and isinstance(high, int | float)
    return float(high) if limited and low == 0 < high else None


def _is_add(node: Node) -> bool:
    """a + b, without alpha or anything else."""
    names = ("add", "add_", "__add__", "__radd__", "__iadd__")
    return node.name in names and len(node.args) == 2 and not node.kwargs


def wide(x: Tensor) -> Tensor:
    """In float32 at least, in which parameters are folded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
