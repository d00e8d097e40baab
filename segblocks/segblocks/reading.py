"""Reading from the device without waiting for what is launched after it."""

import torch
from torch import Tensor


class Reading:
    """A tensor on its way to the host.

    Args:
        value: of any shape and type, on any device; on a CPU it must not change meanwhile.
    """

    def __init__(self, value: Tensor):
        self._value = value.detach().to("cpu", non_blocking=True)  # from CUDA into pinned memory
        self._arrived = None
        if value.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    def wait(self) -> Tensor:
        """The tensor on the CPU, once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value
