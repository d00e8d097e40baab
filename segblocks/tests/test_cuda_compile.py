"""Every kernel compiles for every supported GPU generation; needs NVRTC or nvcc, but no GPU.

NVRTC comes with PyTorch's CUDA builds; it is what CuPy compiles with.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from segblocks.ops.cuda import geometry, joint_norm, module

ARCHITECTURES = (75, 80, 86, 90, 120)
SIZES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}
KERNELS = {
    "split.cu": ["split_rows", "split_planes", "split_tile", "split_backward_rows"],
    "combine.cu": ["combine_rows", "combine_tile", "combine_backward_rows"],
    "combine_strips.cu": ["combine_planes", "combine_narrow"],
    "blockpad.cu": ["blockpad", "blockpad_backward"],
    "blockpad_near.cu": ["blockpad_near", "blockpad_near_backward"],
    "upsample.cu": ["upsample"],
    "upsample_backward.cu": ["upsample_backward"],
    "pool_blocks.cu": ["pool_blocks", "pool_blocks_backward"],
    "windows.cu": ["gather_windows", "sum_windows"],
    "grid.cu": ["build_slots", "choose_slots", "select_budget", "select_budget_large"],
}
WINDOWS = [  # of pooling: the common one, and one whose loops stay loops
    {"kernel_y": 3, "kernel_x": 3, "stride": 2, "dilation_y": 1, "dilation_x": 1},
    {"kernel_y": 16, "kernel_x": 16, "stride": 1, "dilation_y": 2, "dilation_x": 1},
]
LOSS_KERNELS = {  # one element an access: kernel, scales
    "cross_entropy.cu": ("pixel_cross_entropy", (0, 1, 2, 4, 8)),
    "cross_entropy_backward.cu": ("pixel_cross_entropy_backward", (0, 1)),
    "cross_entropy_tiles.cu": ("pixel_cross_entropy_tiles", (2, 4, 8)),
}
SMALL_CONV = "size parts resized pre relu m n warps ahead".split()
NORM_KERNELS = {  # float64 has none: kernels, constants
    "batch_statistics.cu": [{"mask": 0}],
    "batch_normalise.cu": [{"mask": 0}],
    "batch_gradient_sums.cu": [{"mask": mask} for mask in (0, 1, 2)],
    "batch_normalise_backward.cu": [{"mask": mask} for mask in (0, 1, 2)],
    "blockpad_near.cu": [{"normalised": 1, "each": 1}, {"normalised": 1, "each": 2, "index64": 1}],
}
HALF_KERNELS = {  # of the compiled path, half precision, sm_80 and later: kernels, constants
    "small_conv.cu": (
        ["small_conv"],
        [
            dict(zip(SMALL_CONV, values))
            for values in (
                (5, 1, 0, 0, 1, 1, 4, 16, 3),
                (1, 1, 0, 1, 0, 2, 4, 8, 2),
                (1, 4, 1, 1, 0, 4, 8, 2, 1),
            )
        ],
    ),
    "policy.cu": (["policy_first", "policy_scores"], [{}]),
    "excursion.cu": (["pooled_conv", "split_extended"], [{}]),
    "pool.cu": (["max_pool", "averages"], [{}]),
    "depthwise.cu": (
        ["depthwise"],
        [
            {"kernel": kernel, "stride": stride, "relu": relu}
            for kernel, stride, relu in ((3, 1, 0), (5, 2, 1), (7, 1, 2))
        ],
    ),
    "stem.cu": (["split_padded", "stem_places"], [{"packed": 0}, {"packed": 1}]),
}


def constants(file: str, dtype: torch.dtype, width: int, wide_index: bool) -> dict[str, int]:
    """The compile-time constants of a file for `width` bytes per access."""
    values = {
        "dtype": geometry.DTYPES[dtype],
        "vector": width // SIZES[dtype],
        "index64": int(wide_index),
    }
    extra = {
        "split.cu": {"copy": width, "planes": 3 if width == 16 else 0},
        "combine.cu": {"copy": width, "legacy": int(wide_index)},
        "combine_strips.cu": {"vector": 1, "copy": width, "legacy": int(wide_index)},
        "upsample.cu": {"legacy": int(wide_index), "scale": 2 if width == 16 else 0},
        "upsample_backward.cu": {"legacy": int(wide_index), "scale": 2 if width == 16 else 0},
        "pool_blocks.cu": WINDOWS[wide_index],
        "blockpad_near.cu": {"normalised": 0, "each": 1},
        "grid.cu": {"vector": 1},
    }
    return values | extra.get(file, {})


class Nvrtc:
    """The little of NVRTC that a compile check needs."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        count = ctypes.c_int()
        library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        library.nvrtcGetSupportedArchs(known)
        self.architectures = set(known)

    def compile(self, source: str, options: tuple[str, ...], architecture: int) -> str:
        """PTX of the source; machine code is made as well, so that ptxas sees it."""
        program = ctypes.c_void_p()
        handle, text = ctypes.byref(program), source.encode()
        assert self.library.nvrtcCreateProgram(handle, text, b"kernel.cu", 0, None, None) == 0
        flags = [f"--gpu-architecture=sm_{architecture}", *options]
        array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        status = self.library.nvrtcCompileProgram(program, len(flags), array)
        log = self._text("Log", "ProgramLog", program)
        ptx = self._text("PTX", "PTX", program) if status == 0 else ""
        size = ctypes.c_size_t()
        self.library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        self.library.nvrtcDestroyProgram(handle)
        assert status == 0, log
        assert "warning" not in log, log
        assert size.value > 0, "no machine code"
        return ptx

    def _text(self, _: str, what: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.library, f"nvrtcGet{what}")(program, buffer)
        return buffer.value.decode()


@cache
def nvrtc() -> Nvrtc | None:
    """NVRTC from the packages beside PyTorch or from the system; None where there is none."""
    folders = [Path(path) for path in sys.path] + [Path(torch.__file__).parent.parent]
    names = [str(lib) for folder in folders for lib in folder.glob("nvidia/*/lib/libnvrtc.so.*")]
    names += [f"libnvrtc.so.{version}" for version in (13, 12)] + ["libnvrtc.so"]
    for name in names:
        try:
            return Nvrtc(ctypes.CDLL(name))
        except OSError:
            continue
    return None


def compile_with_nvcc(
    source: str, options: tuple[str, ...], architecture: int, folder: Path
) -> str:
    (folder / "kernel.cu").write_text(source)
    command = [
        "nvcc",
        f"-arch=sm_{architecture}",
        "-ptx",
        *options,
        "kernel.cu",
        "-o",
        "kernel.ptx",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "kernel.ptx").read_text()


def compile_ptx(source: str, options: tuple[str, ...], architecture: int, folder: Path) -> str:
    """PTX by NVRTC, else by nvcc; skips where neither knows the architecture."""
    compiler = nvrtc()
    if compiler is not None:
        if architecture not in compiler.architectures:
            pytest.skip(f"this NVRTC does not know sm_{architecture}")
        return compiler.compile(source, options, architecture)
    if shutil.which("nvcc"):
        return compile_with_nvcc(source, options, architecture, folder)
    pytest.skip("neither NVRTC nor nvcc is installed; the kernels were not compiled")


def check_follows(ptx: str, architecture: int = 90) -> None:
    """From Hopper on the kernels of FOLLOWING, and no others, wait for those ahead of them.

    Before that they write nothing. Only from sm_90 on may they be launched early.
    """
    for part in ptx.split(".entry ")[1:]:
        name = part[: part.index("(")]
        before, wait, after = part.partition("griddepcontrol.wait")
        assert bool(wait) == (name in module.FOLLOWING and architecture >= 90), name
        if wait:
            assert not re.search(r"\b(st\.global|atom\.|red\.global)", before), name
            assert "griddepcontrol.launch_dependents" in after


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", KERNELS)
def test_compiles_for_every_generation(file, architecture, tmp_path):
    # Half precision is the case that differs between generations: from sm_80 on, cvt takes pairs.
    for dtype in (torch.float16, torch.bfloat16) if architecture <= 80 else (torch.float16,):
        options = module.defines(**constants(file, dtype, 16, False))
        ptx = compile_ptx(module.source(file), options, architecture, tmp_path)
        for kernel in KERNELS[file]:
            assert f".entry {kernel}(" in ptx
        check_follows(ptx, architecture)


@pytest.mark.parametrize("wide_index", [False, True])
@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("file", KERNELS)
def test_compiles_for_every_type_and_width(file, dtype, wide_index, tmp_path):
    widths = [16] if wide_index else [16, SIZES[dtype]]
    if file == "grid.cu":
        widths = [SIZES[dtype]]
    for width in widths:
        options = module.defines(**constants(file, dtype, width, wide_index))
        ptx = compile_ptx(module.source(file), options, 90, tmp_path)
        if width == 16:  # 16-byte loads and stores, whatever the element
            wide = r"(v4\.[ubf]32|v2\.[ubf]64)"
            path = r"" if "griddepcontrol" in ptx else r"\.nc"
            assert re.search(rf"ld\.global{path}\.{wide}", ptx)
            assert re.search(rf"st\.global\.{wide}", ptx)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("file", HALF_KERNELS)
def test_compiles_in_half_precision(file, architecture, tmp_path):
    kernels, variants = HALF_KERNELS[file]
    for dtype in (torch.float16, torch.bfloat16):
        for more in variants:
            values = {"dtype": geometry.DTYPES[dtype], "vector": 8, "index64": 0, **more}
            options = module.defines(**values)
            ptx = compile_ptx(module.source(file), options, architecture, tmp_path)
            assert all(f".entry {kernel}(" in ptx for kernel in kernels)
            check_follows(ptx, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", LOSS_KERNELS)
def test_the_loss_compiles(file, architecture, tmp_path):
    kernel, scales = LOSS_KERNELS[file]
    for dtype in SIZES:
        for scale in scales if dtype == torch.float16 else scales[1:2]:
            values = {"dtype": geometry.DTYPES[dtype], "vector": 1, "scale": scale}
            values |= {"index64": scale == 4, "last": scale != 1}
            options = module.defines(**values)
            ptx = compile_ptx(module.source(file), options, architecture, tmp_path)
            assert f".entry {kernel}(" in ptx
            assert ".red." not in ptx
            assert "atom." not in ptx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", NORM_KERNELS)
def test_batch_norm_compiles(file, architecture, tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for width in (16, SIZES[dtype]) if architecture == 90 else (16,):
            for more in NORM_KERNELS[file]:
                values = {"dtype": geometry.DTYPES[dtype], "vector": width // SIZES[dtype]}
                options = module.defines(**{"index64": 0, **values, **more})
                ptx = compile_ptx(module.source(file), options, architecture, tmp_path)
                assert f".entry {file.removesuffix('.cu')}(" in ptx
                if width == 16:
                    assert re.search(r"ld\.global\.nc\.(v4\.[ubf]32|v2\.[ubf]64)", ptx)
                check_follows(ptx, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_joining_batch_norms_compiles(architecture, tmp_path):
    options = module.defines(dtype=geometry.DTYPES[torch.float32], vector=1, index64=0)
    ptx = compile_ptx(module.source("batch_join.cu"), options, architecture, tmp_path)
    assert ".entry batch_join(" in ptx
    check_follows(ptx, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("processes", [2, 8])
def test_joining_batch_norms_of_peers_compiles(processes, architecture, tmp_path):
    options = joint_norm.options_of(processes)
    ptx = compile_ptx(module.source("joint_norm.cu"), options, architecture, tmp_path)
    for kernel in ("joint_table", "joint_sums", "greet"):
        assert f".entry {kernel}(" in ptx
    check_follows(ptx, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_turning_weights_compiles(architecture, tmp_path):
    for dtype in SIZES:
        for last in (0, 1):
            options = {"dtype": geometry.DTYPES[dtype], "vector": 1, "index64": 0, "last": last}
            source = module.source("turn_weight.cu")
            ptx = compile_ptx(source, module.defines(**options), architecture, tmp_path)
            assert ".entry turn_weight(" in ptx


def test_sources_stand_alone():
    for file in (
        "turn_weight.cu",
        "batch_join.cu",
        "joint_norm.cu",
        *KERNELS,
        *LOSS_KERNELS,
        *NORM_KERNELS,
        *HALF_KERNELS,
    ):
        text = module.source(file)
        assert "#include" not in text, "a header would escape CuPy's cache key"
        assert text.lstrip().startswith("//"), "the shape contract comes first"


@pytest.mark.parametrize(
    "divisor", [1, 2, 3, 5, 7, 17, 64, 136, 2312, 9248, 65537, 2**30, 2**31 - 1]
)
def test_divider_is_exact(divisor):
    d, multiplier, shift = geometry.divider(divisor)
    assert d == divisor
    assert multiplier < 2**32
    numbers = {0, 1, 2**31 - 1, 2**31 - 2, 12345678}
    numbers |= {k * divisor + e for k in (1, 2, 3, 1000) for e in (-1, 0, 1)}
    numbers |= {(2**31 - 1) // divisor * divisor + e for e in (-1, 0)}
    for n in (n for n in numbers if 0 <= n < 2**31):
        assert ((n * multiplier >> 32) + n) >> shift == n // divisor


def test_access_width():
    assert geometry.access_width(2, 16, 64) == 16
    assert geometry.access_width(2, 16, 12) == 8
    assert geometry.access_width(2, 16, 19) == 2
    assert geometry.access_width(4, 8, 64) == 8
    assert geometry.access_width(8, 16, 3) == 8
    assert geometry.access_width(2, 16, 64, 96, 4) == 8
    assert geometry.alignment(512, 48) == 16
    assert geometry.alignment(512, 514) == 2


def test_a_missing_cupy_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"pip install cupy-cuda1\dx"):
        module.import_cupy()


def test_rejects_what_no_kernel_takes():
    slot, cells = torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    image = torch.zeros(1, 3, 8, 8)
    geometry.check(image, slot, cells, 1, 8)
    with pytest.raises(TypeError, match="no CUDA kernel"):
        geometry.check(image.long(), slot, cells, 1, 8)
    with pytest.raises(TypeError, match="int32"):
        geometry.check(image, slot.long(), cells, 1, 8)
    with pytest.raises(ValueError, match="even"):
        geometry.check(image, slot, cells, 1, 7)
    with pytest.raises(ValueError, match="n_high is 2"):
        geometry.check(image, slot, cells, 2, 8)
    with pytest.raises(ValueError, match=r"image must be \(1, C, 4, 4\)"):
        geometry.check_image(image, slot, 4)
    with pytest.raises(ValueError, match=r"must be \(16, C\)"):
        geometry.check_pixels(torch.zeros(64, 3), 16)
    with pytest.raises(ValueError, match="contiguous"):
        geometry.check_pixels(torch.zeros(3, 16).t(), 16)
