"""Pixels that are computed when somebody reads them, so that what follows a convolution joins it.

A `Pending` is a launch that has been put off: a convolution (or batch norm), then as steps a batch
norm, an addend and a ReLU, as far as the kernel takes them in that order. An operation on a block
tensor whose pixels are pending makes another `Pending` with one step more, or adds the step to this
one where it works in place, so that every block tensor of the same pixels sees it. Whatever reads
pixels has them computed first; nothing is remembered from one forward pass to the next.

What a launch reads stays as it was when the operation was called:
  * pixels: before a function writes into a buffer, and before a caller is handed one (`pixels`),
    everything pending on that grid is computed; from then on nothing is put off on that grid,
    because nobody sees when the caller writes. A buffer that a caller made and kept is watched by
    its version: a change that nothing else can see raises.
  * weights of convolutions: the packed copy is chosen when the convolution is called.
  * batch norm: its tensors are read by the launch itself, where their versions must still be those
    of the call. A parameter is changed between forward passes, of which `combine` leaves nothing
    pending; who keeps blocks uncombined over a change gets an error, never another value.
"""

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .later import Later

# The stream of a device's index on which PyTorch launches now; a PyTorch without CUDA has no such.
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_inference = torch.is_inference_mode_enabled
# What may follow the steps taken so far: n batch norm, a addend, r ReLU.
MAY_FOLLOW = {"": "nar", "n": "ar", "a": "r", "na": "r", "r": "", "nr": "", "ar": "", "nar": ""}


class Pending:
    """Pixels (P, C), computed on first reading.

    Attributes:
        plan: what is computed; it tells the tensor's `stored` shape, dtype, device and index, the
            `name` of the operation for errors, and has `run(cell, job, extend)`, which launches and
            fills the attributes below; with `extend` it makes an extended buffer if it can.
        job: (call, steps, norm, addend): what `run` needs and the steps; None once computed. It is
            replaced whole, so another thread sees all of it or nothing. A call ends with the
            stream and the inference mode that it was made in.
        steps: those that the pixels have been through.
        buffer, address: what has been computed, and where it begins.
        averages: address of the rows that follow the stored ones in an extended buffer; 0: none.
        stream: on which they are, or have been, launched.
        kept: the tensor that `averages` points into, where it is not `buffer`; kept_on: its stream.
        written: the grid's `writes` when the averages were made.
        picture: the image that the pixels were cut from, and its version then; None: from none.
    """

    is_cuda = True
    requires_grad = False
    buffer: Tensor | None = None
    kept: Tensor | None = None
    address = averages = written = kept_on = 0
    picture: tuple[Tensor, int] | None = None
    _tensor: Tensor | None = None

    def __init__(
        self,
        plan: Any,
        later: Later,
        job: tuple | None,
        steps: str = "",
        bases: tuple = (),
        stream: int = 0,
    ):
        self.plan = plan
        self.later = later
        self.job = job
        self.stream = stream if job is None else job[0][-2]
        self.steps = steps
        # (reference, steps) of what the pixels were before their last steps
        self._bases = bases

    shape = property(lambda self: self.plan.stored)
    dtype = property(lambda self: self.plan.dtype)
    device = property(lambda self: self.plan.device)

    def get_device(self) -> int:
        return self.plan.index

    def is_floating_point(self) -> bool:
        return True

    def after(self, step: str, norm: Any, addend: Any) -> "Pending":
        """The pixels after one more step; these stay as they are."""
        steps, later = self.steps, self.later
        more, bases = steps + step, (*self._bases, (weakref.ref(self), steps))
        cell = Pending(self.plan, later, (self.job[0], more, norm, addend), more, bases)
        later.pending.append(weakref.ref(cell))  # where this is pending, no buffer is exposed
        return cell

    def become(self, step: str, norm: Any, addend: Any) -> None:
        """One more step in place."""
        self.steps = steps = self.steps + step
        self.job = (self.job[0], steps, norm, addend)

    def compute(self, extend: bool = False) -> None:
        """Launch, if that has not been done.

        Args:
            extend: a 3×3 window will read the pixels, which then needs the rows that follow.
        """
        job = self.job
        if job is None:
            return
        call, plan = job[0], self.plan
        try:
            current = raw_stream(plan.index)
            if call[-2] != current or call[-1] != _inference():
                self._launch_elsewhere(job, extend, current)
            elif not self._bases or not self._launch_on(job):
                plan.run(self, job, extend)
        except Exception as error:
            error.add_note(f"in '{plan.name}' on blocks, which had been put off until now")
            raise
        self.job = None
        self._bases = ()

    def read(self) -> Tensor:
        """The (P, C) tensor."""
        if self.job is not None:
            self.compute()
        if self.stream != raw_stream(self.plan.index):
            self._order()
        found = self._tensor
        if found is None:
            rows, buffer = self.plan.stored[0], self.buffer
            found = buffer if buffer.shape[0] == rows else buffer.narrow(0, 0, rows)
            self._tensor = found
        return found

    def locate(self, extend: bool) -> None:
        """Make `address`, and where possible `averages`, good for a launch on this stream."""
        if self.job is not None:
            self.compute(extend)
        current = raw_stream(self.plan.index)
        if self.stream != current:
            self._order()
        later = self.later
        stale = later.writes != self.written or later.exposed
        if stale or (self.kept is not None and self.kept_on != current):
            self.averages = 0

    def keep(self, averages: Tensor) -> None:
        """What has been made now, for launches on this stream."""
        self.kept, self.averages = averages, averages.data_ptr()
        self.kept_on, self.written = raw_stream(self.plan.index), self.later.writes

    def __reduce__(self) -> tuple:
        return _itself, (self.read(),)

    # -- how it is computed ----------------------------------------------------------------------

    def _launch_on(self, job: tuple) -> bool:
        """The last steps alone, where the pixels before them are still in somebody's hands."""
        for reference, steps in self._bases[::-1]:
            base = reference()
            # Unless they were changed in place: compute them once, for both.
            if base is not None and base.steps == steps:
                found = _apply(base.read(), job, steps)
                self.address = found.data_ptr()
                self.buffer = found
                return True
        return False

    def _launch(self, job: tuple, extend: bool) -> None:
        if not self._launch_on(job):
            self.plan.run(self, job, extend)

    def _launch_elsewhere(self, job: tuple, extend: bool, current: int) -> None:
        """On the stream of the call, which this one waits for: what comes next may read the pixels,
        or write what they are made from."""
        *_, stream, inference = job[0]
        with torch.inference_mode(inference):
            if stream == current:
                self._launch(job, extend)
                return
            with on_stream(stream, self.plan.device):
                self._launch(job, extend)
        self._order()

    def _order(self) -> None:
        follow(self.stream, self.plan.device, self.buffer)


def _apply(pixels: Tensor, job: tuple, done: str) -> Tensor:
    """The steps behind those that `pixels` have been through, which stay as they are."""
    _, steps, norm, addend = job
    steps = steps[len(done) :]
    if steps[:1] == "n":
        relu = steps == "nr"
        pixels, steps = norm.apply(pixels, relu), "" if relu else steps[1:]
    if steps[:1] == "a":
        addend.check()
        pixels, steps = pixels + addend.holders[0][: pixels.shape[0]], steps[1:]
    return torch.relu(pixels) if steps else pixels


def on_stream(raw: int, device: torch.device) -> AbstractContextManager:
    """PyTorch's launches go to the stream of this address."""
    return torch.cuda.stream(_stream(raw, device))


def follow(raw: int, device: torch.device, *made: Tensor | None) -> None:
    """Let the current stream wait for that of the address `raw`, and keep what was made there for
    as long as this one reads it: a launch may come after the wait that a user has put behind the
    call.
    """
    # A graph that is being captured cannot wait for what is outside; it is replayed later.
    if torch.cuda.is_current_stream_capturing():
        return
    current = torch.cuda.current_stream(device)
    current.wait_stream(_stream(raw, device))
    for tensor in made:
        if tensor is not None:
            tensor.record_stream(current)


def _stream(raw: int, device: torch.device) -> torch.cuda.Stream:
    # Of the address 0, which is the default stream's, ExternalStream makes a new stream.
    if raw == 0:
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(raw, device)


def _itself(pixels: Tensor) -> Tensor:
    return pixels
