"""What a figure was measured with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("segblocks", "torchvision", "torchmetrics", "numpy", "triton", "cupy")


def versions(device: torch.device) -> dict[str, str | int]:
    """Versions of everything a figure may depend on, and the processor it ran on."""
    found: dict[str, str | int] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        installed = _version(package)
        if installed:
            found[package] = installed
    found["cpu"] = _cpu_name()
    found["cpu_cores"] = os.cpu_count() or 0
    found["torch_threads"] = torch.get_num_threads()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda or ""
        found["cudnn"] = torch.backends.cudnn.version() or 0
        found["float32_matmul"] = torch.get_float32_matmul_precision()
    return found


def _version(package: str) -> str | None:
    # CuPy is published under one name per CUDA version.
    names = (package, "cupy-cuda13x", "cupy-cuda12x") if package == "cupy" else (package,)
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
