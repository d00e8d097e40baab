"""Memory for the outputs of eager launches."""

import torch
from torch import Tensor

# torch.empty without the dispatcher, on the current device, as code that torch.compile writes makes
# its buffers. It takes a third of the time; a PyTorch without it has torch.empty.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_strided = getattr(_guards, "_empty_strided_cuda", None)


def new_rows(
    shape: tuple[int, int], dtype: torch.dtype, index: int, device: torch.device
) -> Tensor:
    """An uninitialised buffer of (rows, channels) on `device`, the CUDA device of that index."""
    if _empty_strided is None or index != torch._C._cuda_getDevice():
        return torch.empty(shape, dtype=dtype, device=device)
    return _empty_strided(shape, (shape[1], 1), dtype)
