"""The kernels of batch norm in training equal PyTorch's batch norm, forward and backward.

On a GPU the kernels themselves; anywhere, their arithmetic on the CPU (`emulation.py`).
"""

import importlib
import shutil

import emulation
import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, make_grid

from segblocks import BlockGrid
from segblocks.ops import batch_reference, cuda
from segblocks.ops.cuda import batch_norm

blockpad = importlib.import_module("segblocks.ops.cuda.blockpad")  # not the function

EPS, MOMENTUM = 1e-3, 0.3
CHANNELS = [64, 3, 19, 24, 512]
ROWS = [2, 77, 4096]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(rows, channels, dtype, device, affine=True):
    """Pixels, an addend, a gradient; weight, bias, running mean and variance."""
    x = torch.randn(rows, channels) * torch.rand(channels) + 3 * torch.randn(channels)
    maps = [t.to(dtype).to(device) for t in (x, torch.randn(rows, channels), torch.randn_like(x))]
    rest = [torch.randn(channels) for _ in range(3)] + [torch.rand(channels) + 0.5]
    rest = [t.to(device) for t in rest]
    return maps, [None, None, *rest[2:]] if not affine else rest


def near(found, expected, dtype, terms=0.0):
    """By the largest value of a channel, or the largest of what it is a difference of."""
    error, scale = (found.double() - expected.double()).abs(), expected.abs().amax(0) + terms
    assert (error <= TOLERANCE[dtype] * (1 + scale)).all(), float(error.max())


def check_batch_norm(rows, channels, dtype, device, addend, relu, affine=True):
    (x, more, grad), (weight, bias, mean, variance) = make(rows, channels, dtype, device, affine)
    more, running = more if addend else None, [mean.clone(), variance.clone()]
    versions = [t._version for t in running]
    table = cuda.batch_statistics(x, weight, bias, *running, MOMENTUM, EPS)
    assert all(t._version > before for t, before in zip(running, versions))
    y = cuda.batch_normalise(x, table, more, relu)
    kept = y if addend else None
    sums = cuda.batch_gradient_sums(grad, x, table, kept, relu)
    found = cuda.batch_normalise_backward(grad, x, table, sums, kept, relu, addend)
    assert y.dtype == found[0].dtype == dtype

    leaves = [t if t is None else t.double().requires_grad_() for t in (x, weight, bias, more)]
    mean, variance = mean.double(), variance.double()
    out = F.batch_norm(leaves[0], mean, variance, *leaves[1:3], True, MOMENTUM, EPS)
    out = out + leaves[3] if addend else out
    close = (out.abs() < 1e-2) if relu else None  # where rounding may decide what the ReLU does
    expected = out.relu() if relu else out
    near(y, expected, dtype)
    near(running[0], mean, torch.float32)
    near(running[1], variance, torch.float32)
    if relu:  # the mask of what was stored, so that it is the gradients alone that are compared
        expected = out * ~(y <= 0)
    expected.backward(grad.double())
    assert close is None or torch.equal((y > 0)[~close], (out > 0)[~close])
    near(found[0], leaves[0].grad, dtype, table[2].abs() * grad.double().abs().amax(0))
    if addend:
        assert torch.equal(found[1], grad * ~(y <= 0) if relu else grad)
    if affine:
        scale = max(1.0, float(leaves[1].grad.abs().max()))
        for mine, leaf in zip(sums, (leaves[2], leaves[1])):
            assert (mine - leaf.grad).abs().max() <= TOLERANCE[torch.float32] * 5 * scale
    if relu and not addend:  # the mask is the same bit by bit, wherever it comes from
        again = cuda.batch_gradient_sums(grad, x, table, y, relu)
        assert torch.equal(again, sums)
        again = cuda.batch_normalise_backward(grad, x, table, sums, y, relu, False)
        assert torch.equal(again[0], found[0])


def check_join(operations, channels, dtype, device, affine=True):
    """Of processes with 1, 301 and 21 rows: the batch norm of all rows."""
    (x, *_), (weight, bias, *running) = make(323, channels, dtype, device, affine)
    given, parts = (weight, bias), x.split([1, 301, 21])
    tables = torch.stack([operations.batch_statistics(p, *[None] * 4, 0.0, EPS) for p in parts])
    tables[:, 3] = tables.new_tensor([len(p) for p in parts])[:, None]
    expected = [t.clone() for t in running]
    table = operations.batch_statistics(x, *given, *expected, MOMENTUM, EPS)
    for part in parts:
        moved = [t.clone() for t in running]
        versions = [t._version for t in moved]
        found, share = operations.batch_join(tables, len(part), *given, *moved, MOMENTUM, EPS)
        assert all(t._version > before for t, before in zip(moved, versions))
        assert found.dtype == share.dtype == tables.dtype
        assert float(share) == pytest.approx(len(part) / len(x))
        for one, two in zip((found, *moved), (table, *expected)):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def check_blockpad(kind, channels, dtype, sides, relu, device, block=16):
    grid = BlockGrid.from_mask(make_grid(kind, (2, 2, 3)).to(device))
    where = (grid.slot, grid.cells, grid.n_high, block)
    rows = grid.stored_pixels(block)
    (x, *_), (weight, bias, *_) = make(rows, channels, dtype, device)
    table = cuda.batch_statistics(x, weight, bias, None, None, MOMENTUM, EPS)
    found = cuda.blockpad_normalised(x, table, relu, *where, *sides)
    stored = cuda.batch_normalise(x, table, None, relu)
    assert torch.equal(found, cuda.blockpad(stored, *where, *sides, False, 0.0))


@pytest.fixture
def _emulated(monkeypatch):
    plans = (batch_norm._columns, batch_norm._join, batch_norm._pointwise, blockpad._plan)
    for plan in plans:
        plan.cache_clear()
    for module in (batch_norm, blockpad):
        monkeypatch.setattr(module, "prepare", emulation.prepare)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 2)
    yield
    for plan in plans:
        plan.cache_clear()


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")


@needs_compiler
@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("channels", [8, 19, 264])
@pytest.mark.parametrize("rows", [2, 77, 700])
def test_the_arithmetic_of_the_kernels(rows, channels):
    for i, (addend, relu) in enumerate(((False, True), (True, True), (True, False))):
        dtype = (torch.float32, torch.bfloat16)[(rows + i) % 2]
        check_batch_norm(rows, channels, dtype, "cpu", addend, relu, affine=i != 2)


@needs_compiler
@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("channels", [8, 19, 264])
def test_the_arithmetic_of_joining(channels):
    for affine in (True, False):
        check_join(cuda, channels, torch.float32, "cpu", affine)


@needs_compiler
@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (1, 0, 1, 0), (3, 2, 0, 8)])
def test_the_arithmetic_of_padding(kind, sides):
    for channels, dtype, relu in ((8, torch.bfloat16, True), (3, torch.float32, False)):
        check_blockpad(kind, channels, dtype, sides, relu, "cpu")


@needs_compiler
@pytest.mark.usefixtures("_emulated")
def test_a_large_mean_takes_nothing_from_the_variance():
    x = torch.randn(500, 4) * 0.5 + 1000
    mean, invstd, *_ = cuda.batch_statistics(x, None, None, None, None, 0.1, 0.0)
    variance, expected = torch.var_mean(x.double(), 0, correction=0)
    assert torch.allclose(mean.double(), expected, rtol=1e-7)
    assert torch.allclose(invstd.double(), variance.rsqrt(), rtol=1e-5)


@pytest.mark.parametrize("huge", [1e20, torch.inf, torch.nan])
@needs_compiler
@pytest.mark.usefixtures("_emulated")
def test_what_is_not_finite_stays_in_its_channel(huge):
    x = torch.randn(300, 4)
    x[:, 1] = 1e18
    x[100, 2] = huge
    table = cuda.batch_statistics(x, None, None, None, None, 0.1, 1e-5)
    y = cuda.batch_normalise(x, table, None, True)
    assert y[:, [0, 3]].isfinite().all()
    assert y[:, 1].isfinite().all()
    if huge != 1e20:
        assert y[:, 2].isnan().any()


def on_gpu(function):
    return pytest.mark.gpu(pytest.mark.usefixtures("poisoned_memory")(function))


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("rows", ROWS)
def test_the_kernels(rows, channels, dtype):
    for addend in (False, True):
        for relu in (False, True):
            check_batch_norm(rows, channels, dtype, "cuda", addend, relu, affine=rows != 77)


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_pixels(dtype):
    check_batch_norm(2**19 + 3, 64, dtype, "cuda", True, True)
    check_batch_norm(2**19 + 3, 64, dtype, "cuda", False, True)


@on_gpu
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (1, 0, 1, 0), (3, 2, 0, 8)])
def test_padding_on_the_way(kind, dtype, sides):
    for channels in CHANNELS:
        for relu in (False, True):
            check_blockpad(kind, channels, dtype, sides, relu, "cuda")


def _everything(x, grad, weight, bias):
    table = cuda.batch_statistics(x, weight, bias, None, None, MOMENTUM, EPS)
    y = cuda.batch_normalise(x, table, None, True)
    sums = cuda.batch_gradient_sums(grad, x, table, None, True)
    return table, y, sums, cuda.batch_normalise_backward(grad, x, table, sums, None, True, False)[0]


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [64, 19, 512])
def test_repeats_bit_for_bit_and_in_a_graph(channels, dtype):
    (x, _, grad), (weight, bias, *_) = make(60000, channels, dtype, "cuda")
    first = _everything(x, grad, weight, bias)
    for _ in range(20):
        again = _everything(x, grad, weight, bias)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = _everything(x, grad, weight, bias)
    for _ in range(2):
        for t in replayed:
            t.fill_(7)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(first, replayed))


@on_gpu
def test_streams_do_not_meet():
    (x, _, grad), (weight, bias, *_) = make(200000, 64, torch.bfloat16, "cuda")
    first = _everything(x, grad, weight, bias)
    torch.cuda.synchronize()
    streams, runs = [torch.cuda.Stream() for _ in range(4)], []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                runs.append(_everything(x, grad, weight, bias))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for run in runs for a, b in zip(first, run))


def test_what_does_not_fit_is_refused():
    x, table = torch.zeros(8, 4), torch.zeros(4, 4)
    with pytest.raises(TypeError, match="no CUDA kernel"):
        cuda.batch_normalise(x.double(), table, None, False)
    with pytest.raises(ValueError, match="at least a row"):
        cuda.batch_normalise(x[:0], table, None, False)
    with pytest.raises(ValueError, match="no unbiased variance"):
        cuda.batch_statistics(x[:1], None, None, None, torch.ones(4), 0.1, 0.0)
    with pytest.raises(ValueError, match="do not go with"):
        cuda.batch_normalise(x, table, x[:4], False)
    with pytest.raises(ValueError, match="must be float32"):
        cuda.batch_normalise(x, table[:2], None, False)
    with pytest.raises(ValueError, match="contiguous"):
        cuda.batch_normalise(torch.zeros(4, 8).t(), table, None, False)
    grid = BlockGrid.from_mask(make_grid("mixed", (1, 2, 2)))
    where = (grid.slot, grid.cells, grid.n_high, 4)
    pixels = torch.zeros(grid.stored_pixels(4), 4)
    with pytest.raises(ValueError, match="must lie between"):
        cuda.blockpad_normalised(pixels, table, True, *where, 3, 0, 0, 0)


@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_the_reference_is_batch_norm(relu, addend):
    x, weight, bias, more = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((50, 3), (3,), (3,), (50, 3))
    )
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    running = mean.clone(), variance.clone()
    expected = F.batch_norm(x, mean, variance, weight, bias, True, MOMENTUM, EPS)
    expected = expected + more if addend else expected
    expected = expected.relu() if relu else expected
    grad = torch.randn_like(expected)
    expected.backward(grad)
    with torch.no_grad():
        table = batch_reference.batch_statistics(x, weight, bias, *running, MOMENTUM, EPS)
        out = batch_reference.batch_normalise(x, table, more if addend else None, relu)
        kept = out if addend else None
        sums = batch_reference.batch_gradient_sums(grad, x, table, kept, relu)
        found = batch_reference.batch_normalise_backward(grad, x, table, sums, kept, relu, addend)
    pairs = [(out, expected), (running[0], mean), (running[1], variance), (found[0], x.grad)]
    pairs += [(sums[0], bias.grad), (sums[1], weight.grad)] + [(found[1], more.grad)] * addend
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in pairs)


@pytest.mark.parametrize("affine", [True, False])
def test_reference_joins_processes(affine):
    check_join(batch_reference, 3, torch.float64, "cpu", affine)
