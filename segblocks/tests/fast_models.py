"""Compiled models beside eager ones: how they are built, called and compared."""

import copy

import networks
import pytest
import torch
import torch.nn.functional as F
from fast_networks import SmallEfficientNet, SmallSwiftNet
from torch import Tensor, nn

from segblocks import SegBlocksModel, build_policy, execute_with_grid
from segblocks.borders import crop_output, pad_to_blocks
from segblocks.structure import find

# Relative error against the same network in float64.
BOUND = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
NETWORKS = {  # name: (builder, smallest block)
    "swiftnet": (SmallSwiftNet, 32),
    "resnet18": (networks.resnet18_trunk, 64),
    "efficientnet": (SmallEfficientNet, 32),
}


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not is_hopper(),
        reason="these kernels need compute capability 9.0",
    ),
]


def build(
    device: str,
    net: str | nn.Module = "swiftnet",
    policy: str = "reinforce",
    block=None,
    **settings,
) -> SegBlocksModel:
    """A model in evaluation mode, float32."""
    if isinstance(net, str):
        builder, smallest = NETWORKS[net]
        net, block = builder(), block or smallest
    torch.manual_seed(1)
    model = SegBlocksModel(net, build_policy(policy, block or 32), **settings)
    networks.settle(model.policy)
    return model.float().to(device).eval()


def picture(device: str, height=90, width=120, n=1, seed=0, dtype=torch.float32) -> Tensor:
    """(N, 3, height, width): noise of a strength that differs from place to place."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(n, 3, height, width, generator=generator)
    strength = torch.rand(n, 1, 4, 4, generator=generator) * 2
    return (image * F.interpolate(strength, size=(height, width))).to(device, dtype)


@torch.no_grad()
def eager(model: SegBlocksModel, image: Tensor, grid: Tensor):
    """What the model's network gives for `image` on `grid`, in float64."""
    net = copy.deepcopy(model.net).double()
    padded = pad_to_blocks(image.double(), model.policy.block_size)
    output = execute_with_grid(net, padded, grid, model.legacy_upsample)
    return crop_output(output, tuple(padded.shape[2:]), tuple(image.shape[2:]))


def relative_error(found, expected) -> float:
    """Largest relative error of any tensor in two structures of the same form."""
    found, expected = find(found, Tensor), find(expected, Tensor)
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert found
    pairs = ((a.double(), b.double()) for a, b in zip(found, expected))
    return max(float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs)


def assert_close(fast, model: SegBlocksModel, image: Tensor, result) -> None:
    """The result's logits are those of the eager network on the result's grid."""
    expected = eager(model, image, result.grid)
    assert relative_error(result.logits, expected) < BOUND[fast.dtype]


def random_grid(shape, device: str, seed: int, share: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < share).to(device)
