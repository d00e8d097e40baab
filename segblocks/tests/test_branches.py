"""Work side by side in a CUDA graph gives what it gives one after the other."""

from functools import partial

import pytest
import torch

from segblocks.branches import side_by_side

CPU = torch.device("cpu")


def test_results_come_in_the_order_of_the_calls():
    assert side_by_side(CPU, *(partial(int, text) for text in "312")) == [3, 1, 2]
    assert side_by_side(CPU) == []


@pytest.mark.gpu
def test_branches_of_a_graph():
    """Nested, with memory that is freed and taken again between and inside them."""
    device = torch.device("cuda", torch.cuda.current_device())
    streams: set[torch.cuda.Stream] = set()

    def step(x, i, nested=True):
        streams.add(torch.cuda.current_stream(device))
        y = (x * (i + 1)).sin()
        if nested:
            y, z = side_by_side(device, *(partial(step, y, j, False) for j in (i, i + 1)))
            y = y + z.flip(0)
        return y * 0.5

    def passes(x):
        for _ in range(20):
            x = sum(side_by_side(device, *(partial(step, x, i) for i in range(3))))
        return x

    given = torch.randn(300_001, device=device)
    passes(given)
    assert streams == {torch.cuda.current_stream(device)}, "none but that without a graph"
    streams.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = passes(given)
    assert len(streams) > 3, "branches of branches are others"
    for _ in range(5):
        given.normal_()
        graph.replay()
        assert torch.equal(found, passes(given))
