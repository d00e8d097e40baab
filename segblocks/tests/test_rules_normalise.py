"""Batch norm uses joint statistics of both resolutions; layer norm acts over channels."""

import pytest
import torch
import torch.nn.functional as F
from agreement import GRIDS, TOLERANCE, assert_rule, distance, make_grid, make_image
from definition import slow_blocks
from torch import nn

from segblocks import to_blocks


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_uses_joint_statistics_in_training(kind, affine):
    grid = make_grid(kind)
    image = make_image(grid, 4) * 3 + 1
    runs = []
    for split in (to_blocks, slow_blocks):
        torch.manual_seed(0)
        layer = nn.BatchNorm2d(4, momentum=0.3, affine=affine).double()
        if affine:
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
        leaf = image.clone().requires_grad_()
        out = layer(split(leaf, grid)).combine()
        out.sin().sum().backward()
        results = [out, leaf.grad, layer.running_mean, layer.running_var]
        runs.append(results + [p.grad for p in layer.parameters()])
    for mine, theirs in zip(*runs, strict=True):
        assert distance(mine, theirs) < TOLERANCE
    assert not torch.equal(runs[0][2], torch.zeros(4))


def test_batch_norm_without_running_statistics():
    layer = nn.BatchNorm2d(4, track_running_stats=False).double().eval()
    assert_rule(layer)


def test_batch_norm_counts_batches():
    layer = nn.BatchNorm2d(4, momentum=None).double()
    grid = make_grid("mixed")
    layer(to_blocks(make_image(grid, 4), grid))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("kind", GRIDS)
def test_batch_norm_in_evaluation(kind):
    layer = nn.BatchNorm2d(4).double().eval()
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
        tensor.normal_()
    layer.running_var.uniform_(0.5, 2)
    before = layer.running_mean.clone()
    assert_rule(layer, kind)
    assert torch.equal(layer.running_mean, before)


@pytest.mark.parametrize("training", [True, False])
def test_an_activation_in_place_after_batch_norm_is_not_one_on_a_view(training):
    """Autograd would copy the gradient of the map several times over."""
    grid = make_grid("mixed")
    x = to_blocks(make_image(grid, 4), grid)
    layer = nn.BatchNorm2d(4).double().train(training)
    outs, grads = [], []
    for inplace in (True, False):
        leaf = x.pixels.clone().requires_grad_()
        out = F.relu(layer(x.like(leaf)), inplace=inplace).pixels
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        assert type(out.grad_fn).__name__ == "ReluBackward0"
        outs.append(out)
        grads.append(grad)
    assert torch.equal(*outs)
    assert torch.equal(*grads)


def test_layer_norm_over_channels_as_torchvision_does():
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.ops import Permute

    layer = LayerNorm2d(4, eps=1e-6).double()
    nn.init.normal_(layer.weight)
    assert_rule(layer)
    linear = nn.Linear(4, 6).double()
    block = nn.Sequential(
        Permute([0, 2, 3, 1]), nn.LayerNorm(4).double(), linear, nn.GELU(), Permute([0, 3, 1, 2])
    )
    assert_rule(block)
    assert_rule(lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (4,)))
