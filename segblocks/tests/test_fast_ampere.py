"""Compiled models on the kernels of GPUs before and after Hopper, which run there too."""

from itertools import product

import pytest
import torch
from test_fast_fuse import FUSED
from test_fast_gpu import (
    HALF,
    LEFT_OVER,
    NETWORKS,
    check_large_maps,
    check_network,
    check_no_stale_data,
    check_pattern,
)

from segblocks.fast import run, small_conv
from segblocks.fast.generation import AMPERE, generation
from segblocks.fast.row_tiles import ON_HOPPER, on_ampere, tiles_of

KERNELS = "fused Ampere kernels"


@pytest.fixture
def _ampere(monkeypatch):
    monkeypatch.setenv("SEGBLOCKS_GENERATION", str(AMPERE))
    if generation(torch.device("cuda", torch.cuda.current_device())) != AMPERE:
        pytest.skip("these kernels need compute capability 8.0")


def on_ampere_kernels(test):
    return pytest.mark.gpu(pytest.mark.usefixtures("_ampere")(test))


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), 0), ((8, 0), 8), ((8, 9), 8), ((9, 0), 9), ((12, 0), 8)]
)
def test_generations(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("SEGBLOCKS_GENERATION", raising=False)
    assert generation(torch.device("cuda", 0)) == expected
    assert generation(torch.device("cpu")) == 0
    for most in (9, 8, 0):
        monkeypatch.setenv("SEGBLOCKS_GENERATION", str(most))
        assert generation(torch.device("cuda", 0)) == min(expected, most)
    monkeypatch.setenv("SEGBLOCKS_GENERATION", "ampere")
    with pytest.raises(ValueError, match="give 9"):
        generation(torch.device("cuda", 0))


@pytest.mark.parametrize("shared", [100 << 10, 164 << 10])
def test_tiles_fit_into_shared_memory(shared):
    there = on_ampere(shared)
    for tile in (*there.narrow, *there.wide):
        looked_up = (9 + 1) * tile.rows * 4
        assert tile.resident * (tile.shared + looked_up + 1024) <= shared
    sizes = (32, 512, 4096, 65536), (64, 128), (False, True), (False, True)
    for rows, columns, resized, pre in product(*sizes):
        tile = small_conv.choose_tile(rows, columns, shared)
        ahead = 1 if resized else 2 if pre else 3
        assert small_conv._shared(tile, ahead, resized, pre) + 1024 <= shared


@on_ampere_kernels
def test_hoppers_tiles_are_not_taken():
    assert tiles_of(torch.device("cuda", torch.cuda.current_device())) != ON_HOPPER


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@on_ampere_kernels
def test_fused_patterns(name, channels):
    assert KERNELS in check_pattern(FUSED[name][0], channels, torch.float16)


@LEFT_OVER
@pytest.mark.usefixtures("poisoned_memory")
@on_ampere_kernels
def test_fused_patterns_with_a_round_left_over(name, monkeypatch):
    """Few multiprocessors, so that small maps take several rounds, the last in parts."""
    monkeypatch.setattr(run, "multiprocessors", lambda device: 3)
    check_pattern(FUSED[name][0], 256, torch.float16)


@HALF
@NETWORKS
@on_ampere_kernels
def test_whole_networks(net, dtype):
    image, fast = check_network(net, torch.float32, dtype, KERNELS)
    again = fast(image, budget=0.4).logits.clone()
    assert torch.equal(again, fast(image, budget=0.4).logits), "the same bits"


@on_ampere_kernels
def test_tiles_of_large_maps():
    check_large_maps()


@on_ampere_kernels
def test_no_stale_data():
    check_no_stale_data(20)
