"""The published arithmetic (`legacy_upsample`) in single precision: equal to its definition."""

import copy

import pytest
import torch
from definition import slow_execute, slow_no_blocks
from tiny import DEVICES
from torch import Tensor, nn

import models.swiftnet
import segblocks
from models import build_model

BACKBONES = ("resnet18", "resnet50", "efficientnet_lite1")
GRIDS = {
    "corner": [[[True, False, False], [False, False, False]]],
    "mixed": [[[True, False, True], [False, True, False]]],
    "mostly high": [[[True, True, False], [True, True, True]]],
}
BLOCK = 64


@pytest.fixture
def device(request, monkeypatch):
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return request.param


def build(backbone: str) -> segblocks.SegBlocksModel:
    """Single precision, with statistics that are no longer the initial ones.

    The variances are above one: normalising by smaller ones, untrained weights magnify the
    rounding of single precision beyond the bound, by the definition itself too.
    """
    torch.manual_seed(0)
    net = build_model(backbone, num_classes=19).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 1, 2)
    policy = segblocks.build_policy("reinforce", block_size=BLOCK)
    return segblocks.SegBlocksModel(net, policy, legacy_upsample=True).eval()


@pytest.fixture(scope="module", params=BACKBONES)
def case(request) -> tuple[segblocks.SegBlocksModel, Tensor, dict[str, Tensor]]:
    """A model, an image, and by grid the logits of the definition in double precision."""
    model = build(request.param)
    image = torch.randn(1, 3, 2 * BLOCK, 3 * BLOCK, generator=torch.Generator().manual_seed(1))
    double = build(request.param).net.double()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(models.swiftnet, "no_blocks", slow_no_blocks)
        logits = {
            name: slow_execute(double, image.double(), torch.tensor(grid), legacy=True)
            for name, grid in GRIDS.items()
        }
    return model, image, logits


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("kind", GRIDS)
@torch.no_grad()
def test_eager_is_the_definition(case, kind, device):
    model, image, logits = case
    grid = torch.tensor(GRIDS[kind], device=device)
    net = model.net.to(device)
    found = segblocks.execute_with_grid(net, image.to(device), grid, legacy_upsample=True)
    assert error(found, logits[kind]) < 1e-5
    seamless = segblocks.execute_with_grid(net, image.to(device), grid)
    assert error(seamless, logits[kind]) > 1e-3


@torch.no_grad()
def test_compiled_is_the_definition(case):
    model, image, logits = case
    fast = segblocks.compile(model.cpu(), image)
    for kind, grid in GRIDS.items():
        assert error(fast.execute(image, torch.tensor(grid)), logits[kind]) < 1e-5
    assert fast.how == "fused"


@pytest.mark.gpu
@torch.no_grad()
def test_compiled_on_cuda_is_as_exact_as_eager_half_precision(case):
    model, image, logits = case
    half = copy.deepcopy(model.net).half().cuda()
    fast = segblocks.compile(model.cuda(), image.cuda())
    for kind, grid in GRIDS.items():
        grid = torch.tensor(grid, device="cuda")
        found = fast.execute(image.cuda(), grid)
        eager = segblocks.execute_with_grid(half, image.half().cuda(), grid, legacy_upsample=True)
        assert error(found, logits[kind]) < 2 * error(eager, logits[kind]) + 1e-3
