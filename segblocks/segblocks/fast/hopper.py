"""Kernels for Hopper's own instructions, compiled once."""

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from ..ops.cuda.module import import_cupy, source


@functools.cache
def load(file: str, kernel: str, options: tuple[str, ...], device: int, shared: int) -> Any:
    """CuPy's handle of a kernel for Hopper's own instructions.

    Args:
        shared: dynamic shared memory in bytes that launches may ask for.
    """
    cupy = import_cupy()
    with cupy.cuda.Device(device):
        binary = cubin(source(file), (*options, "-arch=sm_90a"))
        raw = cupy.RawModule(path=str(binary)).get_function(kernel)
        raw.max_dynamic_shared_size_bytes = shared
        return raw.kernel


def cubin(text: str, options: tuple[str, ...]) -> Path:
    """Compile with NVRTC for an architecture that CuPy does not select itself; cached on disk."""
    from cupy.cuda import nvrtc

    key = repr((text, options, nvrtc.getVersion())).encode()
    folder = Path(os.environ.get("CUPY_CACHE_DIR", Path.home() / ".cupy" / "kernel_cache"))
    path = folder / f"segblocks_{hashlib.sha256(key).hexdigest()[:32]}.cubin"
    if path.exists():
        return path
    program = nvrtc.createProgram(text, "segblocks.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        binary = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"NVRTC could not compile the convolution: {log}") from error
    finally:
        nvrtc.destroyProgram(program)
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(binary)
    os.replace(name, path)
    return path
