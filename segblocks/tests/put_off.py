"""Pending launches without a GPU: the same bookkeeping, with PyTorch in place of the kernels."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from segblocks import DualResTensor, dispatch
from segblocks.fast import direct, eager, launches, norms, pending, weights

CHANNELS = 64


class Bench:
    """What has been launched.

    Attributes:
        launched: the operation and its steps, in order.
        stream: on which PyTorch would launch now; capturing: whether for a CUDA graph.
        streams: of what has been launched; waits: streams that have waited, each with for which.
    """

    def __init__(self):
        self.launched: list[str] = []
        self.streams: list[int] = []
        self.waits: list[tuple[int, int]] = []
        self.stream = 0
        self.capturing = False

    @contextmanager
    def on(self, stream, device=None):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def follow(self, stream, device, *made):
        self.waits.append((self.stream, stream))


def is_plain(x) -> bool:
    return type(x) is torch.Tensor and not (torch.is_grad_enabled() and x.requires_grad)


def set_up(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """CPU tensors in float64 take the way of half precision on Hopper."""
    found, copies = Bench(), {}
    pack, rule_conv = weights._pack, F.conv2d

    def keep(weight, bias, versions):
        packed = pack(weight, bias, versions)
        copies[packed.address] = (weight.detach().clone(), None if bias is None else bias.clone())
        return packed

    def finish(cell, pixels, job):
        _, steps, norm, addend = job
        if norm is not None:
            norm.check()
            pixels = normalise(pixels, *norm.tensors, norm.eps)
        if addend is not None:
            addend.check()
            pixels = pixels + addend.holders[0][: pixels.shape[0]]
        cell.buffer = pixels.relu() if steps[-1:] == "r" else pixels
        cell.address = cell.buffer.data_ptr()

    def convolve(plan, cell, job, extend):
        source, packed, grid, *_ = job[0]
        source.check()
        weight, bias = copies[packed.address]
        rows, block = plan.source.rows, plan.source.block
        x = DualResTensor(source.holders[0][:rows].clone(), grid, block)
        with monkeypatch.context() as plain:
            plain.setattr(DualResTensor, "is_cuda", False)
            plain.setattr(dispatch, "current_recorder", lambda: None)
            y = rule_conv(x, weight, bias, block // plan.block, weight.shape[2] // 2)
        found.launched.append("conv2d" + job[1])
        found.streams.append(found.stream)
        finish(cell, y.stored, job)

    def normalise(pixels, mean, variance, weight, bias, eps, relu=False):
        y = F.batch_norm(pixels, mean, variance, weight, bias, False, 0.1, eps)
        return y.relu() if relu else y

    def norm(plan, cell, job, extend):
        source = job[0][0]
        source.check()
        found.launched.append("batch_norm" + job[1][2:])
        found.streams.append(found.stream)
        finish(cell, source.holders[0][: plan.stored[0]], job)

    monkeypatch.setattr(weights, "_PACKED", {})
    monkeypatch.setattr(direct, "PACKED", weights._PACKED)
    monkeypatch.setattr(weights, "_pack", keep)
    monkeypatch.setattr(pending, "raw_stream", lambda index: found.stream)
    monkeypatch.setattr(pending, "on_stream", found.on)
    monkeypatch.setattr(pending, "follow", found.follow)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(DualResTensor, "is_cuda", True)
    for module in (eager, direct):
        monkeypatch.setattr(module, "launches_directly", is_plain)
    monkeypatch.setattr(eager, "_HALVES", (torch.float64,))
    monkeypatch.setattr(eager, "_generation", lambda index: 9)
    monkeypatch.setattr(eager, "max_pool2d", lambda x: None)
    monkeypatch.setattr(launches, "averages_of", lambda *args: torch.zeros(1))
    monkeypatch.setattr(launches.Plan, "run", convolve)
    monkeypatch.setattr(norms.NormPlan, "run", norm)
    monkeypatch.setattr(norms.NormPlan, "kernel", lambda *args: True)
    monkeypatch.setattr(norms, "normalise", normalise)
    return found
