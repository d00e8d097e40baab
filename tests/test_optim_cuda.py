"""Optimiser steps from CUDA graphs do what steps without them do."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.training.optim import CosineSchedule, GraphedStep, build_optimizer

pytestmark = pytest.mark.gpu
ARGS = SimpleNamespace(
    lr=1e-2,
    lr_end=1e-4,
    segblocks_policy_epochs=6,
    segblocks_refine_epochs=0,
    epochs=8,
    weight_decay=1e-3,
    lr_finetune_factor=0.25,
    pretrain_backbone=False,
    segblocks_policy_lr_factor=0.5,
    segblocks_policy_wd_factor=1.0,
)


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"net": nn.Linear(5, 4), "policy": nn.Linear(4, 3)}).cuda()


def trained(graphed, moving):
    """-> weights after eight steps, captures; the policy has gradients from the third step on."""
    net = model()
    optimizer = build_optimizer(net, ARGS)
    schedule = CosineSchedule(optimizer, ARGS)
    step = GraphedStep(optimizer) if graphed else optimizer.step
    places = [torch.empty_like(p) for p in net.parameters()]
    generator = torch.Generator().manual_seed(1)
    kept = []
    for i in range(8):
        for p, place in zip(net.parameters(), places):
            gradient = torch.randn(p.shape, generator=generator).cuda()
            if i < 2 and p.shape[0] == 3:
                continue
            p.grad = gradient if moving else place.copy_(gradient)
            kept.append(gradient)  # so that the next one lies elsewhere
        step()
        schedule.step()
    return [p.detach().clone() for p in net.parameters()], len(step.graphs) if graphed else 0


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_steps_are_equal(moving):
    plain, _ = trained(False, moving)
    graphed, captures = trained(True, moving)
    # Without the policy's gradients, then with; the first step of each makes moments.
    assert captures == (6 if moving else 2)
    for one, two in zip(plain, graphed):
        assert torch.equal(one, two)


def test_a_loaded_checkpoint_and_other_settings_are_noticed():
    """Moments are other tensors then, and numbers are part of the graph."""
    net = model()
    optimizer = build_optimizer(net, ARGS)
    step = GraphedStep(optimizer)
    versions = [p._version for p in net.parameters()]

    def take(plain=False):
        for i, p in enumerate(net.parameters()):
            p.grad = places[i].fill_(0.1 * (i + 1))
        optimizer.step() if plain else step()
        return [p.detach().clone() for p in net.parameters()]

    places = [torch.empty_like(p) for p in net.parameters()]
    for _ in range(3):
        take()
    assert all(p._version > before + 1 for p, before in zip(net.parameters(), versions))
    for change in ("moments", "decay"):
        rates = [group["lr"] for group in optimizer.param_groups]
        if change == "moments":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate  # as when a run goes on
        else:
            optimizer.param_groups[0]["weight_decay"] = 0.5
        weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
        graphed = take()
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
        for one, two in zip(take(plain=True), graphed):
            assert torch.equal(one, two)
