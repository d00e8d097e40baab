"""torch.compile traces networks on blocks into one graph."""

import pytest
import torch
from agreement import TOLERANCE, distance, make_grid, make_image
from networks import image, net, random_network

from segblocks import (
    BlockGrid,
    SegBlocksModel,
    build_policy,
    execute_with_grid,
)

BLOCK = 16


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("seed", [2, 9, 15])
def test_compile_traces_the_network_in_one_graph(backend, seed):
    grid = BlockGrid.from_mask(make_grid("mixed"))
    x = make_image(grid.mask, 3, 16)
    body = random_network(seed).eval()
    fast = torch.compile(
        lambda x, grid: execute_with_grid(body, x, grid), fullgraph=True, backend=backend
    )
    with torch.no_grad():
        assert distance(fast(x, grid), execute_with_grid(body, x, grid)) < TOLERANCE


@pytest.mark.usefixtures("_fresh_compiler")
def test_one_graph_serves_every_grid_of_a_count():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    body = net(2)
    fast = torch.compile(
        lambda x, grid: execute_with_grid(body, x, grid), fullgraph=True, backend=counter
    )
    for seed in range(3):
        grid = BlockGrid.from_mask(make_grid("mixed", seed=seed))
        x = make_image(grid.mask, 3, 16, seed)
        with torch.no_grad():
            assert distance(fast(x, grid), execute_with_grid(body, x, grid)) < TOLERANCE
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", ["reinforce", "heuristic", "middle"])
def test_compile_traces_a_model_with_a_budget(name):
    """Policy, padding, split, network, combine, crop: one graph, nothing read back."""
    model = SegBlocksModel(net(), build_policy(name, BLOCK)).double().eval()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        mine, theirs = fast(image(47, 63), budget=0.5), model(image(47, 63), budget=0.5)
    assert torch.equal(mine.grid, theirs.grid)
    assert distance(mine.logits, theirs.logits) < TOLERANCE
