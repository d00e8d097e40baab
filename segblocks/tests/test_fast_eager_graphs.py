"""Eager inference on Hopper under what users put round it: CUDA graphs, streams, threads."""

import threading

import pytest
import torch
import torch.nn.functional as F
from agreement import make_grid, make_image
from fast_models import ON_HOPPER
from torch import nn

from segblocks import BlockGrid, execute_with_grid, to_blocks

pytestmark = [*ON_HOPPER]

DTYPE = torch.float16


class Net(nn.Module):
    """A stem, a block, a norm that comes first, and what a caller may want to keep."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.conv = nn.Conv2d(64, 64, 3, 1, 1, bias=False)
        self.kept = []

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.norm(self.conv(x))
        y += x
        self.kept = [x, self.norm(x)]
        return self.conv(F.relu(self.norm(F.relu(y, inplace=True))))


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def net():
    torch.manual_seed(0)
    found = Net().eval().to("cuda", DTYPE)
    nn.init.normal_(found.norm.running_mean, std=0.3)
    nn.init.uniform_(found.norm.running_var, 0.5, 2)
    return found


def picture(seed=0):
    mask = make_grid("mixed")
    image = make_image(mask, 3, 32, seed).to("cuda", DTYPE)
    return image, mask.cuda()


def plainly(net, image, mask):
    """Every operation at once."""
    grid = BlockGrid.from_mask(mask)
    grid.later.expose()
    return net(to_blocks(image, grid)).combine(), [x.combine() for x in net.kept]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_joined_launches_equal_single_ones(net):
    image, mask = picture()
    expected, _ = plainly(net, image, mask)
    close(execute_with_grid(net, image, mask), expected)


def test_a_captured_pass_follows_its_image(net):
    """Also what a hook keeps of it."""
    (image, mask), (other, _) = picture(), picture(1)
    grid = BlockGrid.from_mask(mask)
    execute_with_grid(net, image, grid)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = execute_with_grid(net, image, grid)
    kept = net.kept
    for now in (other.clone(), image.clone()):
        image.copy_(now)
        graph.replay()
        expected, values = plainly(net, image, mask)
        close(out, expected)
        for x, value in zip(kept, values):
            close(x.combine(), value)


def test_captured_operations_follow_their_blocks(net):
    """Without a pass around them that would settle what is put off."""
    (image, mask), (other, _) = picture(), picture(1)
    execute_with_grid(net, image, mask)
    y = net.stem(to_blocks(image, mask))
    before = y.stored
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = net.norm(net.conv(y))
    before.copy_(net.stem(to_blocks(other, mask)).stored)
    graph.replay()
    close(z.combine(), net.norm(net.conv(net.stem(to_blocks(other, mask)))).combine())


def test_streams_wait_for_one_another(net):
    image, mask = picture()
    expected, _ = plainly(net, image, mask)
    for parameter in net.parameters():
        parameter.add_(0)  # weights are packed again, by the first stream
    torch.cuda.synchronize()
    one, two = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(one):
        torch.cuda._sleep(10**7)
        x = net.stem(to_blocks(image, mask))
    with torch.cuda.stream(two):
        found = execute_with_grid(net, image, mask)
        close(found, expected)
        x.combine()


def test_threads_do_not_meet(net):
    image, mask = picture()
    expected, _ = plainly(net, image, mask)
    found, stream = [], torch.cuda.Stream()
    torch.cuda.synchronize()

    def run(own):
        with torch.no_grad(), torch.cuda.stream(own):
            found.extend([execute_with_grid(net, image, mask) for _ in range(20)])
            own.synchronize()

    threads = [
        threading.Thread(target=run, args=(s,)) for s in (stream, torch.cuda.current_stream())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for out in found:
        close(out, expected)
