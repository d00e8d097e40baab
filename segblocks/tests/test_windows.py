"""Windows gathered for a matrix product: kernels, registration, and convolutions made of them."""

import shutil

import emulation
import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, make_grid, make_image
from torch.autograd import gradcheck

from segblocks import execute_with_grid, to_blocks
from segblocks.ops import cuda, windows_reference
from segblocks.ops.windows import Windows
from segblocks.rules import product, recompute

gpu = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
CASES = {
    "3x3": Windows(3, 2, 4, 2, 2, 4, (3, 3), (1, 1), (1, 1)),
    "3x3 of one pixel": Windows(2, 3, 2, 2, 2, 2, (3, 3), (1, 1), (1, 1)),
    "stride 2": Windows(2, 1, 8, 1, 1, 4, (3, 3), (2, 2), (1, 1)),
    "1x1 stride 2": Windows(1, 2, 8, 0, 0, 4, (1, 1), (2, 2), (1, 1)),
    "dilation": Windows(1, 1, 4, 4, 2, 4, (3, 2), (1, 1), (2, 2)),
    "high alone": Windows(2, 0, 4, 2, 2, 4, (3, 3), (1, 1), (1, 1)),
    "low alone": Windows(0, 3, 4, 2, 2, 4, (3, 3), (1, 1), (1, 1)),
}


def check(case, channels, dtype, device):
    w = CASES[case]
    padded = torch.randn(w.padded_rows, channels).to(dtype).to(device)
    columns = torch.randn(w.rows, w.taps * channels).to(dtype).to(device)
    found, expected = (f.gather_windows(padded, *w) for f in (cuda, windows_reference))
    assert torch.equal(found, expected)
    found, expected = (f.sum_windows(columns, *w) for f in (cuda, windows_reference))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.parametrize("channels", [8, 3])
@pytest.mark.parametrize("case", CASES)
def test_on_the_cpu(case, channels, monkeypatch):
    plan = cuda.gather_windows.__globals__["_plan"]
    monkeypatch.setitem(cuda.gather_windows.__globals__, "prepare", emulation.prepare)
    plan.cache_clear()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check(case, channels, dtype, "cpu")
    plan.cache_clear()


@pytest.mark.parametrize("case", CASES)
def test_one_is_the_gradient_of_the_other(case):
    w = CASES[case]
    x, y = torch.randn(w.padded_rows, 5).double(), torch.randn(w.rows, w.taps * 5).double()
    one = (windows_reference.gather_windows(x, *w) * y).sum()
    torch.testing.assert_close((windows_reference.sum_windows(y, *w) * x).sum(), one)


@pytest.mark.parametrize("case", CASES)
def test_registration(case):
    w = CASES[case]
    x = torch.randn(w.padded_rows, 5)
    torch.library.opcheck(torch.ops.segblocks.gather_windows.default, (x, *w))
    columns = torch.ops.segblocks.gather_windows(x, *w)
    torch.library.opcheck(torch.ops.segblocks.sum_windows.default, (columns, *w))


def test_what_does_not_fit_is_an_error():
    w = CASES["3x3"]
    with pytest.raises(ValueError, match=r"expected \(\d+, 1 \* C\)"):
        cuda.gather_windows(torch.zeros(5, 4), *w)
    with pytest.raises(ValueError, match="do not give 8 a side"):
        cuda.gather_windows(torch.zeros(w.padded_rows, 4), *w._replace(side=8))
    with pytest.raises(ValueError, match="contiguous"):
        cuda.gather_windows(torch.zeros(4, w.padded_rows).T, *w)


SETTINGS = {
    "3x3": (3, {"padding": 1}),
    "stride 2": (3, {"padding": 1, "stride": 2}),
    "dilation": (3, {"padding": 2, "dilation": 2}),
    "1x1 stride 2": (1, {"stride": 2}),
}


def convolution(kind, name, dtype=torch.float64, device="cpu", channels=4):
    """-> blocks of outputs of at most 4 pixels a side, a convolution of them, its inputs."""
    kernel, settings = SETTINGS[name]
    mask = make_grid(kind, (1, 3, 2))
    image = make_image(mask, channels, 4 * settings.get("stride", 1), dtype=dtype)
    x = to_blocks(image.to(device), mask.to(device))
    weight, bias = torch.randn(6, channels, kernel, kernel), torch.randn(6)

    def function(pixels, weight, bias):
        return F.conv2d(x.like(pixels), weight, bias, **settings).pixels

    inputs = [x.pixels, weight, bias]
    return function, [t.to(device, dtype).clone().requires_grad_() for t in inputs]


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(recompute, "multiplies", lambda x, setting: setting.groups == 1)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_of_a_product(kind, name):
    function, inputs = convolution(kind, name)
    assert gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_product_is_the_convolution(kind, name, monkeypatch):
    function, inputs = convolution(kind, name)
    plain = [function(*inputs)]
    plain += torch.autograd.grad(plain[0].square().sum(), inputs)
    monkeypatch.setattr(recompute, "multiplies", lambda x, setting: True)
    for wanted in ((0, 1, 2), (0,), (1,)):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        out = function(*some)
        torch.testing.assert_close(out, plain[0])
        out.square().sum().backward()
        for i in wanted:
            torch.testing.assert_close(some[i].grad, plain[1 + i])


class TestOnCuda:
    pytestmark = gpu

    @pytest.mark.parametrize("channels", [512, 64, 24, 3])
    @pytest.mark.parametrize("case", CASES)
    def test_the_kernels(self, case, channels):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            check(case, channels, dtype, "cuda")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", GRIDS)
    @pytest.mark.parametrize("name", SETTINGS)
    def test_products(self, kind, name, dtype):
        found = []
        for used, device in ((torch.float64, "cpu"), (dtype, "cuda")):
            torch.manual_seed(1)
            function, inputs = convolution(kind, name, used, device, channels=64)
            out = function(*inputs)
            out.square().mean().backward()
            found.append([out.detach(), *(t.grad for t in inputs)])
        for expected, value in zip(*found):
            error = (value.cpu().double() - expected).norm() / expected.norm()
            assert error < (5e-3 if dtype == torch.float32 else 2e-2)

    def test_deep_layers_of_a_network(self):
        """Against the convolutions of padded blocks."""
        mask = make_grid("mixed", (2, 3, 4)).cuda()
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(64, 128, 3, 2, 1, bias=False),
            torch.nn.BatchNorm2d(128),
            torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(128, 128, 3, 1, 1, bias=False),
            torch.nn.BatchNorm2d(128),
        ).cuda()
        image = torch.randn(2, 64, 3 * 8, 4 * 8, device="cuda")
        found = []
        for small in (0, product._SMALL):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(product, "_SMALL", small)
                net.zero_grad()
                out = execute_with_grid(net, image, mask)
                out.square().mean().backward()
                found.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
        for one, two in zip(*found):
            torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-3 * float(one.abs().max()))
