"""The fast path's kernels compile, for Hopper unspilled and unserialised; needs NVRTC, but no GPU.

The launchers run on CPU tensors with the launches themselves left out, so that what is compiled is
what they ask for.
"""

import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import SimpleNamespace

import networks
import pytest
import torch
from agreement import make_grid, make_image
from fast_networks import Net, SmallEfficientNet, SmallSwiftNet
from programs import record
from test_cuda_compile import ARCHITECTURES, Nvrtc, check_follows, compile_ptx, nvrtc
from test_fast_dense import DENSE, Layers
from test_fast_fuse import FUSED

from segblocks import BlockGrid, DualResTensor
from segblocks.fast import (
    buffers,
    dense_run,
    depthwise,
    eager,
    front,
    grid_tables,
    patches,
    pending,
    pool_kernels,
    row_conv,
    row_tiles,
    run,
    small_conv,
    stem,
    tables,
    tilings,
)
from segblocks.fast import launches as launches_of
from segblocks.fast import policy as fast_policy
from segblocks.fast.compile import _fold_batch_norm
from segblocks.fast.dense_run import DenseFunction
from segblocks.fast.dense_trace import record_dense
from segblocks.fast.fuse import fuse
from segblocks.fast.policy import PolicyKernels
from segblocks.fast.row_conv import Fused
from segblocks.fast.row_tiles import divide
from segblocks.fast.run import Network
from segblocks.ops.cuda import module
from segblocks.ops.cuda import normalise as batch_norm
from segblocks.policy import ReinforcePolicy

HALF = (torch.float16, torch.bfloat16)
TURNED = {"patch_sm90.cu": "patch_conv", "stem_sm90.cu": "stem_conv"}
WITH_WGMMA = {"conv_sm90.cu": "block_conv", **TURNED}
PLAIN = (
    "depthwise.cu",
    "front.cu",
    "stem.cu",
    "pool.cu",
    "tables.cu",
    "patch_tables.cu",
    "normalise.cu",
)
SHARED = 227 << 10  # bytes of shared memory that one thread block of Hopper can have
# The 168 registers of a thread hold patch_conv's 96 sums of three patches, and little more: a few
# words that change with the tile are kept aside. So are up to four with all that block_conv can do.
SPILLED = {"patch_conv": 96, "block_conv": 16}  # bytes
SMALL = ("small_conv.cu", "policy.cu", "excursion.cu")


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher asks for it; `size`: bytes of its only parameter, a struct."""

    file: str
    kernel: str
    options: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Loaded:
    """What `hopper.load` and `module.function` are asked for, in place of a kernel."""

    file: str
    name: str
    options: tuple[str, ...]
    device: int | None
    shared: int


class VerboseNvrtc(Nvrtc):
    """Keeps what the compiler says."""

    log = ""

    def _text(self, name, what, program):
        text = super()._text(name, what, program)
        if what == "ProgramLog":
            self.log = text
        return text


@cache
def compile_verbosely(
    text: str, options: tuple[str, ...], architecture: str = "90a"
) -> tuple[str, str]:
    """PTX and the assembler's remarks, by default for Hopper with its warpgroup instructions."""
    if nvrtc() is None:
        pytest.skip("NVRTC is not installed; the convolution was not compiled")
    if int(architecture.rstrip("a")) not in nvrtc().architectures:
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    compiler = VerboseNvrtc(nvrtc().library)
    options = tuple(o for o in options if not o.startswith("-arch"))
    ptx = compiler.compile(text, (*options, "--ptxas-options=-v"), architecture)
    return ptx, compiler.log


@pytest.fixture
def launches(monkeypatch) -> set[Launch]:
    """What is launched while the test runs; nothing really is."""
    found: set[Launch] = set()
    nothing = SimpleNamespace(launch=lambda *args: None, enqueue=lambda *args: None)

    def prepare(
        file, kernel, options, device, blocks, threads, constants, pointers=4, shared=0, rows=1
    ):
        found.add(Launch(file, kernel, options, 8 * pointers + len(constants)))
        return nothing

    users = (
        pool_kernels,
        depthwise,
        front,
        stem,
        tables,
        patches,
        batch_norm,
        small_conv,
        dense_run,
    )
    for user in (*users, fast_policy):
        monkeypatch.setattr(user, "prepare", prepare)
    for user in (run, stem, batch_norm):
        monkeypatch.setattr(user, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(small_conv, "shared_memory", lambda device: SHARED)
    monkeypatch.setattr(buffers, "_empty_strided", None)  # it is for CUDA alone
    monkeypatch.setattr(pending, "raw_stream", lambda index: 0)
    monkeypatch.setattr(eager, "launches_directly", lambda x: True)
    monkeypatch.setattr(eager, "_generation", lambda device: 9)
    for name in ("averages_kernel", "pool_kernel"):
        monkeypatch.setattr(launches_of, name, getattr(launches_of, name).__wrapped__)
    monkeypatch.setattr(grid_tables, "_layout", grid_tables._layout.__wrapped__)
    monkeypatch.setattr(row_conv, "_kernel", row_conv._kernel.__wrapped__)

    def launch(loaded, grid, block, shared, parameters, device, follows=False):
        assert grid[0] > 0
        assert loaded.name in module.FOLLOWING
        assert shared <= loaded.shared <= SHARED
        found.add(Launch(loaded.file, loaded.name, loaded.options, len(parameters)))

    for user in (row_conv, stem, patches):
        monkeypatch.setattr(user, "load", Loaded)
        monkeypatch.setattr(user, "launch", launch)
    return found


def launch_all(net, dtype, block=32, mask_shape=(1, 2, 2)) -> None:
    """Everything that a compiled network launches."""
    mask = make_grid("mixed", mask_shape)
    image = make_image(mask, 3, block, dtype=dtype)
    program = record(net.to(dtype), image, mask)
    network = Network(program, fuse(program), dtype)
    grid = BlockGrid.from_mask(mask)
    network.prepare(grid.n_high, mask.numel(), torch.device("cpu"))
    network.run(image, grid)
    network.run(image.float(), grid)


def check_conv(launch: Launch) -> None:
    ptx = check_products(module.source(launch.file), launch.options, launch.kernel)
    check_parameter(ptx, launch)


def check_products(text: str, options: tuple[str, ...], kernel: str) -> str:
    """Compiles a kernel of warpgroup products and looks at what became of it; returns the PTX."""
    ptx, remarks = compile_verbosely(text, options)
    assert f".entry {kernel}(" in ptx
    assert "wgmma.mma_async" in ptx
    assert "serialized" not in remarks, remarks
    assert "setmaxnreg" not in remarks, "registers are not handed over: " + remarks
    stores, loads = map(
        int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", remarks).groups()
    )
    assert stores <= SPILLED.get(kernel, 0), remarks
    assert loads <= 4 * SPILLED.get(kernel, 0), remarks
    return ptx


def check_parameter(ptx: str, launch: Launch) -> None:
    """The driver copies as many bytes as the kernel declares, so the record must have them."""
    size = re.search(rf"\.b8 {launch.kernel}_param_0\[(\d+)\]", ptx)
    assert int(size.group(1)) == launch.size
    check_follows(ptx)


# -- the convolution -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("build", "block"),
    [(SmallSwiftNet, 32), (networks.resnet18_trunk, 64)],
    ids=["swiftnet", "rn18"],
)
def test_convolutions_of_whole_networks(build, block, dtype, launches):
    launch_all(build().eval(), dtype, block)
    found = {launch for launch in launches if launch.file in WITH_WGMMA}
    expected = set(WITH_WGMMA.items())
    if not stem.stem_applies(64, block // 2):
        expected.remove(("stem_sm90.cu", "stem_conv"))
    assert {(launch.file, launch.kernel) for launch in found} == expected
    assert len(found) > 3
    for launch in found:
        check_conv(launch)


def test_convolutions_of_every_pattern(launches):
    for function, _ in FUSED.values():
        launch_all(Net(function, 128, stem=True).eval(), torch.float16)
    found = {launch for launch in launches if launch.file in WITH_WGMMA}
    assert len(found) > 8
    for launch in found:
        check_conv(launch)


@pytest.mark.parametrize("rows", [1000, 1000000])
@pytest.mark.parametrize(
    "fused",
    [
        Fused(averages=False, separate=True, late=True),
        Fused(taps=1, averages=False, late=True),
        Fused(taps=1, averages=False, stem=True, late=True),
        Fused(averages=False),
        Fused(relu=True),
        Fused(extra=True, relu=True),
        Fused(add=1, relu=True),
        Fused(taps=1, add=2, pre=True, post=True),
        Fused(taps=1, relu=True, limited=True, stem=True),
        Fused(taps=1, add=1, ragged=True),
        Fused(taps=1, add=2, pre=True, post=True, ragged=True),
        Fused(relu=True, limited=True, ragged=True),
    ],
    ids=str,
)
def test_convolutions_of_every_size(fused, rows, monkeypatch):
    """The tiles that are chosen for few and many rows, narrow and wide."""
    monkeypatch.setattr(row_conv, "load", Loaded)
    for columns in (64, 128):
        tile = divide(rows, columns, fused.taps * 2, 132).tile
        loaded = row_conv._kernel.__wrapped__(fused, tile, torch.float16, 0)
        check_products(module.source(loaded.file), loaded.options, loaded.name)


@pytest.mark.parametrize("architecture", ["80", "86", "120"])
@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
def test_convolutions_before_and_after_hopper(dtype, architecture, monkeypatch):
    """Tiles of GPUs with much shared memory, and with little."""
    monkeypatch.setattr(row_conv, "function", Loaded)
    there = row_tiles.on_ampere((164 if architecture == "80" else 100) << 10)
    for fused in (
        Fused(add=1, relu=True),
        Fused(extra=True, relu=True, ragged=True),
        Fused(taps=1, add=2, pre=True, post=True, ragged=True),
        Fused(taps=1, relu=True, limited=True, stem=True),
    ):
        for tile in (*there.narrow, *there.wide):
            loaded = row_conv._kernel.__wrapped__(fused, tile, dtype, 0)
            assert loaded.file == "conv_sm80.cu"
            looked_up = (fused.taps + fused.extra) * tile.rows * 4
            most = (163 if architecture == "80" else 99) << 10
            assert (loaded.shared + looked_up + 1024) * tile.resident <= most + 1024
            text = module.source(loaded.file)
            ptx, remarks = compile_verbosely(text, loaded.options, architecture)
            check_follows(ptx, int(architecture))
            spilled = map(int, re.findall(r"(\d+) bytes spill", remarks))
            assert max(spilled) <= 128, remarks


@pytest.mark.parametrize("dtype", HALF, ids=["fp16", "bf16"])
def test_patch_convolutions_with_every_option(dtype, launches):
    """Weights resident and streamed, with an affine behind and without, ReLU or not, tiles of three
    patches or none."""
    few, many = tables.Scale.of(8, 4, 12), tables.Scale.of(16, 256, 1024)
    x, bias = torch.zeros(1, 64, dtype=dtype), torch.zeros(128)
    kinds = (
        (few, tilings.Tiling.of(few), (64, 0, 128)),
        (many, tilings.Tiling.of(many), (256, 64, 256)),
        (many, tilings.Tiling.of_patches(many, 800), (256, 64, 256)),
    )
    for (scale, tiling, channels), post, relu in product(
        kinds, (None, torch.zeros(2, 256)), (False, True)
    ):
        division = tilings.divide(tiling, channels, 132)
        assert division.resident == (scale is few)
        own = count = torch.zeros(1, dtype=torch.int32)
        packed = x.new_zeros(1, channels[2], 1)
        patches.convolve_patches(
            division, scale, x, packed, bias, x, channels, own, own, own,
            post=post, relu=relu, count=count,
        )  # fmt: skip
    assert len(launches) == 12
    for launch in launches:
        assert launch.file == "patch_sm90.cu"
        check_conv(launch)


def test_serialised_products_would_be_seen():
    """A kernel that touches its accumulators too early is remarked upon."""
    headers = module.source("conv_sm90.cu").split("constexpr int BM")[0]
    kernel = """
    extern "C" __global__ void early(float* out, unsigned long long a, unsigned long long b) {
        float d[32] = {};
        wgmma_fence();
        for (int i = 0; i < 4; i++) {
            Wgmma<64>::run(d, a + i, b, 1);
            wgmma_commit();
            d[i] += 1;
        }
        wgmma_wait<0>();
        for (int i = 0; i < 32; i++) out[i * 128 + threadIdx.x] = d[i];
    }
    """
    options = module.defines(dtype=0, vector=8, index64=0)
    assert "serialized" in compile_verbosely(headers + kernel, options)[1]


# -- what goes round it ----------------------------------------------------------------------------


def test_other_kernels_compile_as_they_are_launched(launches, tmp_path):
    for dtype in HALF:
        launch_all(SmallSwiftNet().eval(), dtype)
        launch_all(SmallEfficientNet().eval(), dtype)
        launch_all(Net(lambda net, x: net.conv(x).exp(), stem=True).eval(), dtype)
        pixels = torch.zeros(24, 64, dtype=dtype)
        for kind in (dtype, torch.float32):
            statistics = torch.ones(64, dtype=kind)
            batch_norm.plan.cache_clear()
            assert batch_norm.normalise(pixels, *[statistics] * 4, 1e-5) is not None
            for high in (None, (16, 4)):
                assert batch_norm.plan(dtype, kind, 0, 24, 64, 1e-5, True, high) is not None
        grid = BlockGrid.from_mask(torch.tensor([[[True, False]]]))
        rows = torch.zeros(grid.stored_pixels(8), 64, dtype=dtype)
        assert eager.max_pool2d(DualResTensor(rows, grid, 8)).block == 4
        stem.split_padded(torch.zeros(1, 3, 8, 16), grid.slot, grid.cells, 1, 8, dtype)
        scales = [tables.Scale.of(block, 1, 2) for block in (8, 16)]
        cuts = [tilings.Cut(scale.block, tilings.Tiling.of(scale)) for scale in scales]
        assert len(patches.build_patches(grid.slot, grid.cells, 1, cuts)) == 2
    batch_norm.plan.cache_clear()
    found = {launch for launch in launches if launch.file in PLAIN}
    assert {launch.file for launch in found} == set(PLAIN)
    assert {launch.kernel for launch in found} == {
        "begin",
        "depthwise",
        "split_padded",
        "stem_places",
        "max_pool",
        "averages",
        "build_tables",
        "build_patches",
        "normalise",
    }
    for launch in found:
        ptx = compile_ptx(module.source(launch.file), launch.options, 90, tmp_path)
        assert f".entry {launch.kernel}(" in ptx
        check_parameter(ptx, launch)


def test_small_maps_compile_as_they_are_launched(launches, tmp_path):
    for dtype in HALF:
        layers = Layers().to(dtype)
        own = {t.untyped_storage().data_ptr() for t in (*layers.parameters(), *layers.buffers())}
        x = torch.zeros(1, 16, 12, 20, dtype=dtype)
        program = record_dense(lambda x, n=layers: DENSE["pyramid"][0](n, x), x, own)
        with torch.no_grad():
            dense = DenseFunction(program, kernels=True)(x)
        mask = make_grid("mixed", (1, 3, 5))
        grid, scale = BlockGrid.from_mask(mask), tables.Scale.of(4, int(mask.sum()), mask.numel())
        stem.split_extended(dense, grid.cells, tuple(mask.shape), scale)
        policy = _fold_batch_norm(ReinforcePolicy(64).eval()).requires_grad_(False)
        kernels = PolicyKernels.of(policy, dtype)
        for image in (torch.zeros(1, 3, 128, 192), torch.zeros(4, 3, 512, 512)):
            kernels.scores(image)
            assert kernels.spend(image, 3) is not None
    found = {launch for launch in launches if launch.file in SMALL}
    assert {launch.kernel for launch in found} == {
        "small_conv",
        "pooled_conv",
        "split_extended",
        "policy_first",
        "policy_scores",
    }
    for launch in found:
        ptx = compile_ptx(module.source(launch.file), launch.options, 90, tmp_path)
        assert f".entry {launch.kernel}(" in ptx
        check_parameter(ptx, launch)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_norm_compiles_for_every_generation(architecture, tmp_path):
    """Eager inference uses it on all of them."""
    for dtype in (0, 1) if architecture >= 80 else (0,):
        options = module.defines(dtype=dtype, vector=8, index64=0, statistics_half=1)
        ptx = compile_ptx(module.source("normalise.cu"), options, architecture, tmp_path)
        assert ".entry normalise(" in ptx


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a >= 80])
def test_max_pooling_compiles_where_it_is_used(architecture, tmp_path):
    """Eager inference uses it, and the tables that it reads, from sm_80 on."""
    for dtype in (0, 1):
        options = module.defines(dtype=dtype, vector=8, index64=0, separate=1)
        ptx = compile_ptx(module.source("pool.cu"), options, architecture, tmp_path)
        assert ".entry max_pool(" in ptx
        assert ".entry averages(" in ptx
    ptx = compile_ptx(module.source("tables.cu"), ("-std=c++17",), architecture, tmp_path)
    assert ".entry build_tables(" in ptx


@pytest.mark.parametrize("file", [*WITH_WGMMA, *PLAIN, *SMALL])
def test_sources_stand_alone(file):
    text = module.source(file)
    assert "#include" not in text, "a header would escape CuPy's cache key"
    assert text.lstrip().startswith("//"), "the shape contract comes first"
