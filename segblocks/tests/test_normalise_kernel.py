"""The batch norm kernel, emulated on the CPU too: values, ReLU, and averages beside them."""

import emulation
import pytest
import torch
import torch.nn.functional as F
from fast_models import DEVICES

from segblocks.fast import norms
from segblocks.ops.cuda import normalise as kernels

DTYPE = torch.bfloat16
N_HIGH, N_LOW, BLOCK = 3, 2, 8
HIGH = N_HIGH * BLOCK**2
ROWS = HIGH + N_LOW * BLOCK**2 // 4


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        monkeypatch.setattr(kernels, "prepare", emulation.prepare)
        monkeypatch.setattr(kernels, "multiprocessors", lambda device: 2)
    kernels.plan.cache_clear()
    yield request.param
    kernels.plan.cache_clear()


def make(channels: int, kind: torch.dtype, affine: bool, device: str):
    """Pixels (ROWS, channels) of DTYPE; mean, variance, weight and bias of `kind`."""
    torch.manual_seed(channels)
    x = torch.randn(ROWS, channels, device=device).to(DTYPE)
    mean, weight, bias = (torch.randn(channels, device=device).to(kind) for _ in range(3))
    variance = (torch.rand(channels, device=device) + 0.5).to(kind)
    return x, (mean, variance, weight, bias) if affine else (mean, variance, None, None)


def expect(x, tensors, relu: bool) -> torch.Tensor:
    wide = [None if t is None else t.float() for t in tensors]
    y = F.batch_norm(x.float(), *wide, eps=1e-3)
    return y.relu() if relu else y


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("kind", [DTYPE, torch.float32])
def test_values(device, kind, relu, affine):
    x, tensors = make(24, kind, affine, device)
    y = kernels.normalise(x, *tensors, 1e-3, relu)
    torch.testing.assert_close(y.float(), expect(x, tensors, relu), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("channels", [8, 24, 64, 264])
def test_extended_buffers(device, monkeypatch, channels, relu):
    """Stored pixels as ever, averages at the edges of high blocks, then a row of zeros."""
    x, tensors = make(channels, torch.float32, True, device)
    quads = (
        torch.arange(HIGH, device=device).view(N_HIGH, BLOCK // 2, 2, BLOCK // 2, 2).transpose(2, 3)
    )
    own = quads.reshape(-1).int().contiguous()
    rows = ROWS + HIGH // 4 + 1
    out = torch.full((rows, channels), 7.0, dtype=DTYPE, device=device)
    norm = norms.norm_of(*tensors, 1e-3)
    plan = norms.NormPlan((ROWS, channels), DTYPE, x.get_device(), x.device)
    kernel = plan.kernel(norm, relu, (HIGH, BLOCK))
    kernel.enqueue(x.get_device(), x.data_ptr(), *norm.addresses, out.data_ptr(), own.data_ptr())
    plain = kernels.normalise(x, *tensors, 1e-3, relu)
    assert torch.equal(out[:ROWS], plain)
    assert not out[-1].any()
    means = out[ROWS:-1].view(N_HIGH, BLOCK // 2, BLOCK // 2, channels)
    expected = plain[own.long()].view(-1, 4, channels).float().mean(1).to(DTYPE).view_as(means)
    assert torch.equal(means[:, [0, -1]], expected[:, [0, -1]])
    assert torch.equal(means[:, :, [0, -1]], expected[:, :, [0, -1]])
    assert (means[:, 1:-1, 1:-1] == 7).all()  # nobody reads them


def test_blocks_all_low(device):
    """Then only the row of zeros follows."""
    x, tensors = make(16, DTYPE, True, device)
    own = torch.zeros(4, dtype=torch.int32, device=device)
    out = torch.full((ROWS + 1, 16), 7.0, dtype=DTYPE, device=device)
    norm = norms.norm_of(*tensors, 1e-3)
    kernel = norms.NormPlan((ROWS, 16), DTYPE, x.get_device(), x.device).kernel(
        norm, True, (0, BLOCK)
    )
    kernel.enqueue(x.get_device(), x.data_ptr(), *norm.addresses, out.data_ptr(), own.data_ptr())
    assert torch.equal(out[:ROWS], kernels.normalise(x, *tensors, 1e-3, True))
    assert not out[-1].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[0].add_(1),
        lambda t: setattr(t[2], "data", t[2].data.clone()),
        lambda t: setattr(t[3], "data", t[3].data.double()),
    ],
)
def test_changed_statistics_are_examined_again(change):
    """A batch norm is remembered by its tensors, their memory and how often they were changed."""
    tensors = [torch.ones(16) for _ in range(4)]
    first = norms.norm_of(*tensors, 1e-3)
    assert norms.norm_of(*tensors, 1e-3) == first
    change(tensors)
    now = norms.norm_of(*tensors, 1e-3)
    assert now is None or now[3:] != first[3:]
    assert (now is None) == (len({t.dtype for t in tensors}) > 1)
    name = id(tensors[0])
    del first, now
    tensors.clear()
    assert name not in norms._KNOWN


@pytest.mark.parametrize("others", [torch.ones(8), torch.ones(16).double()])
def test_tensors_that_differ_do_not_suit(others):
    mean = torch.zeros(16)
    assert norms.norm_of(mean, others, None, None, 1e-3) is None
    assert norms.norm_of(mean, torch.ones(16), others, others, 1e-3) is None
