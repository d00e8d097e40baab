"""Processes that write into each other's memory join batch norms as `batch_join` does.

Here several ranks live in one process: on a GPU each on a stream of its own, anywhere as threads in
which the kernels' arithmetic runs on the CPU (`emulation.py`). Processes of their own, which share
memory of a GPU, are in tests/test_ranks.py.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import emulation
import pytest
import torch
import torch.distributed as dist
from together import run_together

from segblocks import peers
from segblocks.ops import batch_reference
from segblocks.ops.cuda import joint_norm
from segblocks.ops.cuda.joint_norm import Peers
from segblocks.rules import normalised

EPS, MOMENTUM = 1e-3, 0.3


def make_ranks(count: int, device: str) -> tuple[list[Peers], list[torch.Tensor]]:
    """Each with memory of its own, which comes with them."""
    words = joint_norm.bytes_of_words(count)
    size = (words + joint_norm.BYTES_OF_ROUNDS) // 8
    memory = [torch.zeros(size, dtype=torch.int64, device=device) for _ in range(count)]
    addresses = [m.data_ptr() for m in memory]
    return [Peers(i, (a + words, *addresses)) for i, a in enumerate(addresses)], memory


def make_round(count: int, channels: int, device: str) -> list[tuple]:
    """Of each rank: table, number of rows, weight, bias, running statistics, sums."""
    pixels = [torch.randn(2 + 3 * i, channels) * 2 + i for i in range(count)]
    shared = [torch.randn(channels, device=device) for _ in range(3)]
    shared.append(torch.rand(channels, device=device) + 0.5)
    return [
        (
            batch_reference.batch_statistics(x, None, None, None, None, 0.0, EPS).to(device),
            len(x),
            *(t.clone() for t in shared),
            torch.randn(2, channels, device=device),
        )
        for x in pixels
    ]


def run(rank: Peers, table, rows, weight, bias, mean, variance, sums) -> tuple:
    given = (weight, bias, mean, variance)
    joint, share = joint_norm.joint_table(rank, table, rows, *given, MOMENTUM, EPS)
    return joint, share, mean, variance, joint_norm.joint_sums(rank, sums, share)


def start(count: int, own: tuple) -> None:
    """Load the kernels and give the stream memory, which may wait for a kernel that waits."""
    (rank, *_), (words, *_) = make_ranks(count, "cuda")
    half = joint_norm.bytes_of_words(count) // 16
    words[:half] = 2 << 32  # what the others send in the second round, and in the first
    words[half : 2 * half] = 1 << 32
    run(rank, *own)
    torch.cuda.synchronize()


def expected_of(given: list[tuple]) -> list[tuple]:
    tables = torch.stack([table for table, *_ in given]).cpu()
    tables[:, 3] = torch.tensor([float(rows) for _, rows, *_ in given])[:, None]
    total = sum(sums.double().cpu() for *_, sums in given)
    results = []
    for _, rows, weight, bias, mean, variance, _ in given:
        running = [mean.cpu().clone(), variance.cpu().clone()]
        affine = (weight.cpu(), bias.cpu())
        joint = batch_reference.batch_join(tables, rows, *affine, *running, MOMENTUM, EPS)
        results.append((*joint, *running, (total * joint[1]).float()))
    return results


def check(found: list[tuple], expected: list[tuple]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2e-5, atol=2e-5)
    for mine in found[1:]:  # the same bits in all processes
        for a, b in zip((mine[0], *mine[2:4]), (found[0][0], *found[0][2:4])):
            assert torch.equal(a, b)


@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
@pytest.mark.parametrize("count", [2, 3])
def test_the_arithmetic_of_the_kernels(monkeypatch, count):
    def prepare(file, kernel, options, device, blocks, threads, constants, pointers):
        # A library for each rank, as threads of one would share the number of the thread block.
        options += (f"-DRANK={constants[0]}",)
        return emulation.prepare(
            file, kernel, options, device, blocks, threads, constants, pointers
        )

    joint_norm._kernel.cache_clear()
    monkeypatch.setattr(joint_norm, "prepare", prepare)
    ranks, memory = make_ranks(count, "cpu")
    for rank in ranks:
        joint_norm.greet(rank, 0, rank.rank + 1)
    assert [m[: count + 1].tolist() for m in memory] == [[*range(1, count + 1), 0]] * count
    for channels in (3, 66, 5, 5):
        given = make_round(count, channels, "cpu")
        expected = expected_of(given)
        with ThreadPoolExecutor(count) as pool:
            check(list(pool.map(run, ranks, *zip(*given))), expected)
    rounds = torch.stack([m[joint_norm.bytes_of_words(count) // 8 :] for m in memory]).view(
        torch.int32
    )
    assert rounds[:, :3].tolist() == [[8, 2, 0]] * count
    joint_norm._kernel.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_kernels(count):
    """Rounds one behind the other, of changing numbers of channels, as they are and from graphs."""
    ranks, memory = make_ranks(count, "cuda")
    streams = [torch.cuda.Stream() for _ in ranks]
    given = [make_round(count, channels, "cuda") for channels in (64, 3, 512, 2048, 65)]
    for stream, own in zip(streams, make_round(count, 64, "cuda")):
        with torch.cuda.stream(stream):
            start(count, own)
    expected = [expected_of(g) for g in given]
    torch.cuda.synchronize()
    results: list[list[tuple]] = []
    for g in given:
        results.append([])
        for rank, stream, own in zip(ranks, streams, g):
            with torch.cuda.stream(stream):
                results[-1].append(run(rank, *own))
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected):
        check(found, wanted)

    graphs = [torch.cuda.CUDAGraph() for _ in ranks]
    again = make_round(count, 96, "cuda")
    wanted = expected_of(again)
    before = [(own[4].clone(), own[5].clone()) for own in again]
    replayed = []
    for graph, rank, stream, own in zip(graphs, ranks, streams, again):
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            replayed.append(run(rank, *own))
    for _ in range(30):
        for own, (mean, variance) in zip(again, before):
            own[4].copy_(mean), own[5].copy_(variance)
        torch.cuda.synchronize()
        for i, (graph, stream) in enumerate(zip(graphs, streams)):
            with torch.cuda.stream(stream):
                if i == 0:  # as written, while the others replay
                    found = run(ranks[0], *again[0])
                else:
                    graph.replay()
        torch.cuda.synchronize()
        check([found, *replayed[1:]], wanted)
    del memory


@pytest.mark.parametrize("what", ["nothing", "_share", "_open", "_greeted", "_heard", "_host"])
def test_all_agree_whether_they_reach_each_other(tmp_path, what):
    """Where something does not work for one of two processes, neither relies on it."""
    assert run_together(_meet_without, 2, tmp_path, what) == [what == "nothing"] * 2


def _meet_without(what: str) -> bool:
    works = {"_share": (64, b"64"), "_open": [64, 128], "_host": ("here",)}
    works |= {"_greeted": True, "_heard": True}
    fails = {"_share": (0, None), "_open": None, "_host": ("there",)}
    fails |= {"_greeted": False, "_heard": False}
    for name, value in works.items():
        found = fails[name] if name == what and dist.get_rank() else value
        setattr(peers, name, lambda *_, found=found: found)
    return peers._meet(0) is not None


def test_those_who_meet_again_settle_it_again(tmp_path):
    """Once for a group; in a CUDA graph nobody can, nor later."""
    assert run_together(_meet_again, 1, tmp_path) == [True]


def _meet_again() -> bool:
    meetings: list[int] = []
    peers._meet = lambda index: meetings.append(index) or f"meeting {len(meetings)}"
    peers.torch.cuda.device = lambda index: nullcontext()
    capturing = False
    peers.torch.cuda.is_current_stream_capturing = lambda: capturing
    found = [peers.peers_on(1), peers.peers_on(1)]
    dist.destroy_process_group()
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    found.append(peers.peers_on(1))
    capturing = True
    found.append(peers.peers_on(0))
    capturing = False
    found.append(peers.peers_on(0))
    return found == ["meeting 1", "meeting 1", "meeting 2", None, None]


@pytest.mark.gpu
def test_meeting_without_others_to_reach(tmp_path):
    """Two processes of which one does not want to."""
    assert run_together(_meet_unwilling, 2, tmp_path) == [True, True]


def _meet_unwilling() -> bool:
    if dist.get_rank():
        os.environ["SEGBLOCKS_PEERS"] = "0"
    return peers.peers_on(0) is None and peers.peers_on(0) is None


@pytest.mark.gpu
def test_processes_that_share_a_device(tmp_path):
    one, two = run_together(_exchange, 2, tmp_path)
    torch.manual_seed(0)
    given = [make_round(2, channels, "cpu") for channels in (64, 3, 512)]
    for i, g in enumerate(given):
        check([one[i], two[i]], expected_of(g))


def _exchange() -> list[tuple]:
    torch.manual_seed(0)
    found, rank = peers.peers_on(0), dist.get_rank()
    assert found is not None
    assert (found.rank, found.count) == (rank, 2)
    results = []
    for channels in (64, 3, 512):
        own = make_round(2, channels, "cpu")[rank]
        result = run(found, *(t.cuda() if torch.is_tensor(t) else t for t in own))
        results.append(tuple(t.cpu() for t in result))
    return results


def test_what_does_not_fit_is_refused():
    rank, table = Peers(0, (0, 0, 0)), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="must be float32"):
        joint_norm.joint_table(rank, table.double(), 5, None, None, None, None, 0.1, EPS)
    with pytest.raises(ValueError, match="must be float32"):
        joint_norm.joint_sums(rank, table[:2], torch.zeros(1))
    wide = torch.zeros(4, joint_norm.COLUMNS + 1)
    assert normalised._MOST_CHANNELS <= joint_norm.COLUMNS
    with pytest.raises(ValueError, match="too many"):
        joint_norm.joint_table(rank, wide, 5, None, None, None, None, 0.1, EPS)
