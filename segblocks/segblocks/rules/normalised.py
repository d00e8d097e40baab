"""Batch norm in training whose output is made by what follows it.

Statistics are taken, and running ones updated, when the batch norm is called. Making the output is
put off: an addend and a ReLU join it in one launch, and a convolution with a halo makes it on its
own way, while it pads, forward and backward; then it is never stored. Reading the pixels makes it.

In the graph of autograd a convolution hangs on an `edge`, a tensor of the output's shape with
nothing in it, whose backward pass is the batch norm's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..dispatch import current_recorder
from ..fast import pending
from ..fast.later import Later
from ..ops.batch_norm import batch_statistics
from ..tensor import DualResTensor
from .joint import joint_statistics
from .norm_gradients import BatchNorm, Edge

_MOST_CHANNELS = 8192
_ADD = frozenset("add add_ __add__ __radd__ __iadd__".split())
_RELU = frozenset(("relu", "relu_"))


class Norm(NamedTuple):
    """A batch norm that has been called.

    Attributes:
        pixels: (P, C), its input; version: its version then.
        table: see `ops.batch_norm`; share: these pixels' of all that it is of, None for one.
        weight, bias: for their gradients alone; their values are in the table.
        stream: on which the table is made.
    """

    pixels: Tensor
    version: int
    table: Tensor
    share: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    stream: int

    def check(self, addend: Tensor | None = None, version: int = 0) -> None:
        """Raise RuntimeError if what is to be read was changed where nobody saw it."""
        same = self.pixels._version == self.version
        if not same or (addend is not None and addend._version != version):
            raise RuntimeError(
                "pixels of blocks were changed in place before an operation that had read them was "
                "computed; take them from the block tensor (x.pixels) instead of keeping them"
            )


class Normalised:
    """Pixels (P, C), computed on first reading; in a block tensor's place of a tensor.

    Attributes:
        job: (norm, addend, its version, relu); None once computed. See `Later`.
    """

    requires_grad = True

    def __init__(
        self,
        norm: Norm,
        later: Later,
        addend: Tensor | None = None,
        version: int = 0,
        relu: bool = False,
    ):
        x = norm.pixels
        self.shape, self.dtype, self.device, self.is_cuda = x.shape, x.dtype, x.device, x.is_cuda
        self.job = (norm, addend, version, relu)
        self._tensor: Tensor | None = None
        self._edge: Tensor | None = None
        self._made_on = 0  # the stream, once computed
        later.add(self, norm.stream)

    def get_device(self) -> int:
        return self.device.index if self.is_cuda else -1

    def is_floating_point(self) -> bool:
        return True

    def compute(self, extend: bool = False) -> None:
        """Make the pixels, if that has not been done."""
        if self.job is None:
            return
        norm, addend, version, relu = self.job
        try:
            norm.check(addend, version)
            self._made_on = _follow_stream(norm, addend)
            # Gradients were enabled when the batch norm was called.
            with torch.inference_mode(False), torch.enable_grad():
                given = (norm.pixels, norm.weight, norm.bias, addend)
                self._tensor = BatchNorm.apply(*given, norm.table, norm.share, relu)
        except Exception as error:
            error.add_note("in 'batch_norm' on blocks, which had been put off until now")
            raise
        self.job = self._edge = None

    def read(self) -> Tensor:
        """The (P, C) tensor."""
        self.compute()
        found = self._tensor
        if self.is_cuda and self._made_on != pending.raw_stream(found.get_device()):
            pending.follow(self._made_on, found.device, found)
        return found

    def prologue(self) -> "Prologue | None":
        """For who makes the pixels himself; None where they are there, or have an addend."""
        if self.job is None or self.job[1] is not None or not _is_plain():
            return None
        norm, _, _, relu = self.job
        norm.check()
        _follow_stream(norm)
        if self._edge is None:
            given = (norm.pixels, norm.weight, norm.bias)
            self._edge = Edge.apply(*given, norm.table, norm.share, relu)
        return Prologue(norm.pixels.detach(), norm.table, relu, self._edge)

    def become(self, addend: Tensor | None, version: int, relu: bool) -> None:
        """Other steps behind the batch norm, in place."""
        self.job, self._edge = (self.job[0], addend, version, relu), None

    def __reduce__(self) -> tuple:
        return pending._itself, (self.read(),)


class Prologue(NamedTuple):
    """What stands for pixels that are never stored.

    Attributes:
        pixels, table, relu: as `ops.batch_norm` takes them, without gradient.
        edge: (P, C) for autograd alone; there is nothing in it.
    """

    pixels: Tensor
    table: Tensor
    relu: bool
    edge: Tensor


def put_off(
    x: DualResTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    joint: bool = False,
) -> DualResTensor | None:
    """Batch norm in training; None where this way is not open.

    Args:
        joint: with the statistics of the pixels of all processes, which all call this. Whether they
            exchange them here must not depend on what one of them alone looks at, so that where
            nothing may be put off the output is made at once.
    """
    at_once = not _is_plain() or x.grid.later.exposed
    if at_once and not joint:
        return None
    pixels = x.stored
    found = _statistics(pixels, weight, bias, running_mean, running_var, momentum, eps, joint)
    if found is None:
        return None
    if at_once:
        return x.like(BatchNorm.apply(pixels, weight, bias, None, *found, False))
    stream = pending.raw_stream(pixels.get_device()) if pixels.is_cuda else 0
    norm = Norm(pixels, pixels._version, *found, weight, bias, stream)
    return x.like(Normalised(norm, x.grid.later))


def joint_batch_norm(
    pixels: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor | None:
    """Batch norm of the rows (P, C) of all processes, which all call this; None where this way is
    not open, for all of them alike."""
    found = _statistics(pixels, weight, bias, running_mean, running_var, momentum, eps, True)
    return None if found is None else BatchNorm.apply(pixels, weight, bias, None, *found, False)


def _statistics(
    pixels: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    joint: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Table and share of `Norm`; None where there are no kernels for this."""
    given = (weight, bias, running_mean, running_var)
    if not takes_kernels(pixels) or type(pixels) is not Tensor or not pixels.is_contiguous():
        return None
    if (
        (pixels.shape[0] < 2 and not joint)
        or pixels.shape[1] > _MOST_CHANNELS
        or pixels.is_inference()
    ):
        return None
    wide = torch.float64 if pixels.dtype == torch.float64 else torch.float32
    if not all(t is None or _suits(t, pixels, wide) for t in given):
        return None
    if not any(t is not None and t.requires_grad for t in (pixels, weight, bias)):
        return None
    parameters = (t if t is None else t.detach() for t in given[:2])
    arguments = (pixels.detach(), *parameters, running_mean, running_var, momentum, eps)
    return joint_statistics(*arguments) if joint else (batch_statistics(*arguments), None)


def takes_kernels(pixels: Tensor) -> bool:
    """Where there are kernels; elsewhere PyTorch's own batch norm is as good."""
    return pixels.is_cuda and pixels.dtype in (torch.float16, torch.bfloat16, torch.float32)


def join(name: str, args: tuple, kwargs: dict[str, Any]) -> DualResTensor | None:
    """A ReLU or a sum that joins a batch norm that has been put off; None where it does not."""
    if name in _RELU and len(args) == 1:
        in_place = name == "relu_" or bool(kwargs.get("inplace"))
        if kwargs and list(kwargs) != ["inplace"]:
            return None
        return _join(args[0], None, in_place)
    if name not in _ADD or len(args) != 2 or kwargs:
        return None
    x, y = args
    in_place = name in ("add_", "__iadd__")
    joined = _join(x, y, in_place)
    return _join(y, x, False) if joined is None and not in_place else joined


def _join(x: Any, addend: Any, in_place: bool) -> DualResTensor | None:
    """The sum with `addend`, or without one the ReLU."""
    value = x._value if type(x) is DualResTensor else None
    if type(value) is not Normalised or value.job is None or not _is_plain():
        return None
    norm, pixels, version, relu = value.job
    if addend is not None:
        if pixels is not None or relu or type(addend) is not DualResTensor:
            return None
        pixels = addend.stored  # which may compute x
        if value.job is None or type(pixels) is not Tensor or not pixels.is_contiguous():
            return None
        if (pixels.dtype, pixels.shape) != (value.dtype, value.shape) or pixels.is_inference():
            return None
        version = pixels._version
    steps = (pixels, version, addend is None)
    if in_place:
        value.become(*steps)
        return x
    return x.like(Normalised(norm, x.grid.later, *steps))


def _is_plain() -> bool:
    """Gradients, and nobody who wants to see every operation."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and _get_current_dispatch_mode() is None
        and current_recorder() is None
    )


def _suits(tensor: Tensor, pixels: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is dtype
        and tensor.device == pixels.device
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )


def _follow_stream(norm: Norm, addend: Tensor | None = None) -> int:
    """Wait for the stream on which the batch norm was called, if it is another one; -> this one."""
    x = norm.pixels
    stream = pending.raw_stream(x.get_device()) if x.is_cuda else 0
    if stream != norm.stream:
        pending.follow(norm.stream, x.device, x, norm.table, addend)
    return stream
