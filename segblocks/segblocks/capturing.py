"""What any capture of a CUDA graph needs: no interruption, and order after a failure."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


class CaptureFailed(RuntimeError):
    """A pass is no part of a graph; the message says why."""


@contextmanager
def without_collection() -> Iterator[None]:
    """Garbage in cycles is not collected inside. A CUDA graph among it, of a network that nobody
    uses any more, would end a capture in this thread: CUDA destroys none meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def cleared_up(device: torch.device, pool: Any) -> Iterator[None]:
    """A capture into `pool` inside is left alone by the garbage collector, and what it leaves
    behind when it fails is put right.

    Raises:
        CaptureFailed: it did; then the CUDA generator of the device is another one with the same
            state. Memory of the failed pass is free once this has been handled
            (`torch.cuda.empty_cache`).
    """
    stream = torch.cuda.current_stream(device)
    try:
        with without_collection():
            yield
        return
    except Exception as error:  # whatever a network of its own may raise it raises without us, too
        # PyTorch leaves its capture stream in place, and the generator waiting for the end.
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize(device)
        if torch.__version__ < (2, 12):  # whose allocator would go on as if there was a capture
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device.index, pool)
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
        while error.__context__ is not None:  # the first one says what was wrong
            error = error.__context__
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise CaptureFailed(reason)
