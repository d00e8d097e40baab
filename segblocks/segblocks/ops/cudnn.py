"""cuDNN's convolution into a tensor that is there already; `F.conv2d` allocates its output."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # channels_last is not for float64


def takes_cudnn(x: Tensor, groups: int) -> bool:
    """Where PyTorch takes cuDNN for `x` of any size; with groups that depends on the shape.

    False while a dispatch mode (a FLOP counter, say) wants to see the usual operation.
    """
    return (
        x.is_cuda
        and groups == 1
        and x.dtype in _DTYPES
        and torch.backends.cudnn.enabled
        and torch.backends.cudnn.is_available()
        and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) >= (8, 0))
        and _get_current_dispatch_mode() is None
    )


def convolve_into(
    target: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """`target` = convolution of `x` (N, C, H, W), both channels_last, by PyTorch's settings."""
    flags = torch.backends.cudnn
    deterministic = flags.deterministic or torch.are_deterministic_algorithms_enabled()
    how = (1, flags.benchmark, deterministic, allows_tf32())
    torch.ops.aten.cudnn_convolution.out(x, weight, padding, stride, dilation, *how, out=target)


def allows_tf32() -> bool:
    """Whether convolutions in float32 may round their inputs to TF32."""
    # Where the setting by operation exists, reading the older one may raise.
    settings = getattr(torch.backends.cudnn, "conv", None)
    if settings is not None:
        return settings.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32
