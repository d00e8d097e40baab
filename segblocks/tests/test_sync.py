"""Training in several processes: batch norm, draws and the policy's loss are of the whole batch."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from agreement import make_image
from together import run_together
from torch import nn

import segblocks
from segblocks import (
    Replicas,
    SyncBatchNorm,
    build_policy,
    convert_sync_batchnorm,
    sync,
    to_blocks,
)
from segblocks.policy.base import block_mean
from segblocks.rules import normalised
from segblocks.rules.normalised import Normalised

GRID = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 1], [0, 0]]]).bool()


def _norm(momentum: float | None) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(4, momentum=momentum)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.double()


def _pass(
    rank: int,
    count: int,
    blocks: bool,
    momentum: float | None,
    put_off: bool = False,
    mask: torch.Tensor = GRID,
    block: int = 8,
) -> dict[str, torch.Tensor]:
    """Two passes of this process's images, and what they leave behind.

    Args:
        put_off: as on CUDA, where the output is made by what follows, but for the last process,
            in which somebody looks at the pixels.
    """
    layer = _norm(momentum)
    if put_off:
        normalised.takes_kernels = lambda pixels: True
    if count > 1:
        layer = convert_sync_batchnorm(nn.Sequential(layer))[0]
        assert isinstance(layer, SyncBatchNorm)
    image = (make_image(mask, 4, block) * 3 + 1)[rank::count].clone().requires_grad_()
    weight = torch.linspace(1, 2, len(mask), dtype=torch.float64)[rank::count].view(-1, 1, 1, 1)
    for _ in range(2):
        x = to_blocks(image, mask[rank::count]) if blocks else image
        looks = put_off and rank == count - 1
        if looks:
            x.grid.later.expose()
        out = layer(x)
        assert isinstance(getattr(out, "_value", out), Normalised) == (put_off and not looks)
        out = out.combine() if blocks else out
        (out.sin() * weight).sum().backward()
    grads = {"weight_grad": layer.weight.grad, "bias_grad": layer.bias.grad}
    if count > 1:
        for grad in grads.values():
            dist.all_reduce(grad)
    return {"out": out.detach(), "image_grad": image.grad, **grads, **layer.state_dict()}


def _passes(*args) -> dict[str, torch.Tensor]:
    return _pass(dist.get_rank(), dist.get_world_size(), *args)


@pytest.mark.parametrize(
    ("count", "blocks", "momentum", "put_off"),
    [(2, True, 0.3, False), (2, False, None, False), (4, True, None, False), (4, True, 0.3, True)],
)
def test_sync_batch_norm_equals_one_process(tmp_path, count, blocks, momentum, put_off):
    """Processes hold 2 or 1 images, with unequally many high blocks, none and all included."""
    compare_with_one_process(tmp_path, count, blocks, momentum, put_off)


def test_a_process_may_hold_a_single_pixel(tmp_path):
    mask = torch.tensor([[[True]], [[False]]])
    compare_with_one_process(tmp_path, 2, True, 0.3, True, mask, 2)


def compare_with_one_process(tmp_path, count, blocks, momentum, put_off, *where):
    whole = _pass(0, 1, blocks, momentum, False, *where)
    parts = run_together(_passes, count, tmp_path, blocks, momentum, put_off, *where)
    for name, value in whole.items():
        for rank, part in enumerate(parts):
            own = value[rank::count] if name in ("out", "image_grad") else value
            torch.testing.assert_close(part[name], own, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 3, 4, 5), (2, 3, 4, 5), (2, 3, 2, 2, 2)])
def test_rows_become_a_map_that_may_be_changed_in_place(shape):
    """With the gradient of what they hold, and no view of them for autograd."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows = x.movedim(1, -1).reshape(-1, shape[1]).contiguous()
    image = sync._AsImage.apply(2 * rows, x.shape)
    assert torch.equal(image, 2 * x)
    assert not image._is_view()
    torch.relu_(image).square().sum().backward()
    assert torch.allclose(x.grad, 8 * x.relu())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_maps_on_gpus_go_one_way_and_keep_their_layout(monkeypatch, count, layout):
    """Where GPUs reach each other, whatever the layout and the number of images."""
    given = []

    def normalise(rows, *rest):
        given.append(rows)
        return 2 * rows

    monkeypatch.setattr(sync, "takes_kernels", lambda x: True)
    monkeypatch.setattr(sync, "peers_on", lambda index: "peers")
    monkeypatch.setattr(sync, "joint_batch_norm", normalise)
    monkeypatch.setattr(sync.SyncBatchNorm, "_in_steps", None)
    x = torch.randn(count, 3, 4, 5).contiguous(memory_format=layout)
    on_gpu = x.as_subclass(_OnGpu)
    out = SyncBatchNorm(3)._joint(on_gpu, 0.1).as_subclass(torch.Tensor)
    assert torch.equal(out, 2 * x)
    assert out.stride() == x.stride()
    assert given[0].is_contiguous()


class _OnGpu(torch.Tensor):
    is_cuda = True


def test_converted_network_keeps_names_values_and_mode():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(_norm(0.1), nn.ReLU())).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert convert_sync_batchnorm(net) is net
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not net[1][0].training
    grid = GRID[:1]
    net.double()
    image = make_image(grid, 3)
    segblocks.execute_with_grid(net, image, grid)  # evaluation needs no process group
    segblocks.execute_with_grid(net.train(), image, grid)  # nor does training alone


class NormThenRelu6(nn.BatchNorm2d):
    def __init__(self, channels: int):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_what_a_batch_norm_does_afterwards_stays(training):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), NormThenRelu6(4)).double().train(training)
    image, names = make_image(GRID, 3), list(net.state_dict())
    with torch.no_grad():
        expected = [net(image), segblocks.execute_with_grid(net, image, GRID)]
        convert_sync_batchnorm(net)
        found = [net(image), segblocks.execute_with_grid(net, image, GRID)]
    assert list(net.state_dict()) == names
    assert (expected[0] == 0).any()
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two)


def test_a_batch_norm_of_its_own_is_refused():
    with pytest.raises(NotImplementedError, match="Doubled has a forward pass of its own"):
        convert_sync_batchnorm(nn.Sequential(Doubled(4)))
    net = nn.Sequential(nn.SyncBatchNorm(4))
    assert isinstance(convert_sync_batchnorm(net)[0], SyncBatchNorm)


LEARNING = {
    "published": {},
    "normalised": {"normalise_advantage": True, "entropy_weight": 0.1},
    "budgets": {"budgets": (0.1, 0.9), "recolour": True},
    "refining": {"budgets": (0.1, 0.9), "entropy_weight": 0.5},
}


def _policy_step(rank: int, count: int, learning: str) -> dict[str, torch.Tensor]:
    """A REINFORCE step on this process's images, its loss and gradients added up."""
    torch.manual_seed(0)
    # Without rounding up, which is each process's own.
    policy = build_policy("reinforce", 32, quantize_percentage=0, **LEARNING[learning]).double()
    image = torch.randn(4, 3, 64, 96, dtype=torch.float64)
    loss_map, valid = torch.rand(4, 64, 96), torch.rand(4, 64, 96) > 0.3
    valid[0] = False
    policy.replicas = Replicas(rank, count)
    convert_sync_batchnorm(policy)
    torch.manual_seed(5)
    decision = policy(image[rank::count])
    names = "grid sampled scores log_probs probs".split()
    result = SimpleNamespace(
        **{n: getattr(decision, n) for n in names},
        share=decision.grid.float().mean(),
    )
    if learning == "refining":
        gain = block_mean(loss_map, 32)[0]
        before = torch.randn(4, 2, 3)
        loss, stats = policy.refining_loss(result, gain[rank::count], before[rank::count])
    else:
        loss, stats = policy.loss(result, loss_map[rank::count], valid[rank::count])
    loss.backward()
    found = {"loss": loss.detach()} | {n: p.grad for n, p in policy.named_parameters()}
    if count > 1:
        for value in found.values():
            dist.all_reduce(value)
    return found | stats | {"grid": decision.grid}


def _policy_steps() -> dict[str, dict[str, torch.Tensor]]:
    place = dist.get_rank(), dist.get_world_size()
    return {learning: _policy_step(*place, learning) for learning in LEARNING}


def test_reinforce_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    wholes = {learning: _policy_step(0, 1, learning) for learning in LEARNING}
    assert 0 < wholes["published"]["share"] < 1
    for rank, parts in enumerate(run_together(_policy_steps, 2, tmp_path)):
        for learning, part in parts.items():
            whole = wholes[learning]
            assert torch.equal(part.pop("grid"), whole["grid"][rank::2])
            for name, value in part.items():
                torch.testing.assert_close(
                    value,
                    whole[name],
                    rtol=1e-5,
                    atol=1e-5,  # of float32 terms that cancel
                    msg=f"{learning}: {name}",
                )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_draws_do_not_depend_on_how_many_processes_share_them(count):
    torch.manual_seed(2)
    expected = Replicas().uniform((8, 2, 3), torch.device("cpu"))
    for index in range(count):
        torch.manual_seed(2)
        own = Replicas(index, count).uniform((8 // count, 2, 3), torch.device("cpu"))
        assert torch.equal(own, expected[index::count])
