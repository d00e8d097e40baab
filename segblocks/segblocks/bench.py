"""Speed of the CUDA block operations beside a plain copy of the same bytes.

    python -m segblocks.bench
    python -m segblocks.bench --json kernels.json

Every operation, forward and backward, in float16, bfloat16 and float32, at real layer shapes of a
2048×1024 image with 128-pixel blocks, 40 % of them high. A line gives the median time of one call
in CUDA-graph replay, the bytes it must move (inputs read once, outputs written once), and the time
of a device-to-device copy that reads and writes as many bytes in the same run. Calls rotate over
several inputs and outputs, together at least three times the L2 cache, so that neither flatters.
All lie on one grid, as the layers of a network do, whose slots each of them reads again.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .capturing import without_collection
from .ops import cuda

GRID = (8, 16)
LAYERS = [(64, 32), (128, 32), (512, 4)]  # channels, block side: 64×256×512, 128×256×512, 512×32×64
IMAGE = (3, 128)
BATCHES = (1, 8)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CALLS_PER_GRAPH = 20
SECONDS_PER_RESULT = 0.06


@dataclass(frozen=True)
class Result:
    """One line of the table; times in microseconds, speed in GB/s of bytes read plus written."""

    operation: str
    shape: str
    batch: int
    dtype: str
    megabytes: float
    time_us: float
    gb_per_s: float
    copy_us: float
    ratio: float


@dataclass(frozen=True)
class Blocks:
    """Bookkeeping of one random grid, as the operations take it."""

    slot: Tensor
    cells: Tensor
    n_high: int
    block: int

    @classmethod
    def random(cls, batch: int, block: int, share: float) -> "Blocks":
        count = round(share * GRID[0] * GRID[1])
        scores = torch.rand(batch, *GRID, device="cuda")
        slot, cells = cuda.build_slots(cuda.select_budget(scores, count))
        return cls(slot, cells, batch * count, block)

    @property
    def place(self) -> tuple[Tensor, Tensor, int, int]:
        return self.slot, self.cells, self.n_high, self.block

    def pixels(self, channels: int, dtype: torch.dtype, scale: int = 1, pad: int = 0) -> Tensor:
        b, half = self.block * scale + 2 * pad, self.block // 2 * scale + 2 * pad
        rows = self.n_high * b * b + (self.slot.numel() - self.n_high) * half * half
        return torch.randn(rows, channels, device="cuda", dtype=dtype)

    def image(self, channels: int, dtype: torch.dtype, channels_last: bool = True) -> Tensor:
        n, gh, gw = self.slot.shape
        size = (n, channels, gh * self.block, gw * self.block)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.randn(size, device="cuda", dtype=dtype).contiguous(memory_format=layout)


def layer_operations(channels: int, dtype: torch.dtype) -> dict[str, Callable[[Blocks], tuple]]:
    """Name → maker of (call, input), for one set of blocks."""
    halo = (1, 1, 1, 1)

    def run(operation: Callable, source: Tensor, b: Blocks, *rest: object) -> tuple:
        return (lambda: operation(source, *b.place, *rest)), source

    def pixels(b: Blocks, **size: int) -> Tensor:
        return b.pixels(channels, dtype, **size)

    def image(b: Blocks) -> Tensor:
        return b.image(channels, dtype)

    return {
        "split": lambda b: run(cuda.split, image(b), b),
        "split backward": lambda b: run(cuda.split_backward, pixels(b), b, True),
        "combine": lambda b: run(cuda.combine, pixels(b), b, False),
        "combine backward": lambda b: run(cuda.combine_backward, image(b), b, False),
        "blockpad(1)": lambda b: run(cuda.blockpad, pixels(b), b, *halo, False, 0.0),
        "blockpad(1) backward": lambda b: run(
            cuda.blockpad_backward, pixels(b, pad=1), b, *halo, False
        ),
        "upsample(2)": lambda b: run(cuda.upsample, pixels(b), b, 2, False),
        "upsample(2) backward": lambda b: run(
            cuda.upsample_backward, pixels(b, scale=2), b, 2, False
        ),
    }


def image_operations(channels: int, dtype: torch.dtype) -> dict[str, Callable[[Blocks], tuple]]:
    """Splitting and combining images at full size, in both layouts."""

    def split(b: Blocks, last: bool) -> tuple:
        image = b.image(channels, dtype, last)
        return (lambda: cuda.split(image, *b.place)), image

    def combine(b: Blocks, last: bool) -> tuple:
        pixels = b.pixels(channels, dtype)
        return (lambda: cuda.combine(pixels, *b.place, False, last)), pixels

    def pad(b: Blocks) -> tuple:
        pixels = b.pixels(channels, dtype)
        return (lambda: cuda.blockpad(pixels, *b.place, 3, 3, 3, 3, False, 0.0)), pixels

    return {
        "split contiguous": lambda b: split(b, False),
        "split channels_last": lambda b: split(b, True),
        "combine contiguous": lambda b: combine(b, False),
        "combine channels_last": lambda b: combine(b, True),
        "blockpad(3)": pad,
    }


def time_graph(calls: list[Callable[[], Tensor]]) -> float:
    """Median microseconds of one call, the calls taking turns in one CUDA graph."""
    held = [None] * len(calls)

    def turn(i: int) -> None:
        held[i % len(calls)] = calls[i % len(calls)]()  # an output lives until its next turn

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(len(calls)):
            turn(i)
    torch.cuda.current_stream().wait_stream(stream)
    held[:] = [None] * len(calls)
    n = max(CALLS_PER_GRAPH, len(calls))
    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph):
        for i in range(n):
            turn(i)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    times, stop = [], time.perf_counter() + SECONDS_PER_RESULT
    while len(times) < 7 or (time.perf_counter() < stop and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / n)
    return statistics.median(times)


def time_copy(n_bytes: int, sets: int) -> float:
    """Median microseconds of a copy that reads and writes n_bytes together."""

    def copy() -> Callable[[], Tensor]:
        source = torch.randint(0, 127, (n_bytes // 2,), dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return time_graph([copy() for _ in range(sets)])


def measure(
    name: str,
    make: Callable[[Blocks], tuple],
    channels: int,
    block: int,
    batch: int,
    dtype: torch.dtype,
    share: float,
) -> Result:
    """Time one operation and its copy."""
    blocks = Blocks.random(batch, block, share)
    call, source = make(blocks)
    n_bytes = source.nbytes + call().nbytes
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    sets = min(40, max(2, -(-3 * cache // n_bytes)))
    calls = [call, *(make(blocks)[0] for _ in range(sets - 1))]
    microseconds = time_graph(calls)
    del call, calls, source
    copy = time_copy(n_bytes, sets)
    return Result(
        name,
        f"{channels}×{GRID[0] * block}×{GRID[1] * block}",
        batch,
        str(dtype).removeprefix("torch."),
        round(n_bytes / 1e6, 2),
        round(microseconds, 2),
        round(n_bytes / microseconds / 1e3, 1),
        round(copy, 2),
        round(microseconds / copy, 3),
    )


def bookkeeping(share: float) -> dict[str, float]:
    """Microseconds of the grid operations in graph replay, and of the host per eager launch."""
    times = {}
    for batch in BATCHES:
        scores = torch.rand(batch, *GRID, device="cuda")
        count = round(share * GRID[0] * GRID[1])
        grid = cuda.select_budget(scores, count)
        times[f"select_budget batch {batch}"] = time_graph(
            [lambda scores=scores, count=count: cuda.select_budget(scores, count)]
        )
        times[f"build_slots batch {batch}"] = time_graph([lambda grid=grid: cuda.build_slots(grid)])
    blocks = Blocks.random(1, 4, share)
    pixels = blocks.pixels(8, torch.float16)
    torch.cuda.synchronize()
    calls = 500  # fewer than the launch queue holds
    start = time.perf_counter()
    for _ in range(calls):
        cuda.blockpad(pixels, *blocks.place, 1, 1, 1, 1, False, 0.0)
    times["host time of one eager blockpad"] = (time.perf_counter() - start) / calls * 1e6
    torch.cuda.synchronize()
    return {name: round(value, 2) for name, value in times.items()}


def versions() -> dict[str, str]:
    import cupy

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cupy": cupy.__version__,
        "python": platform.python_version(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m segblocks.bench",
        description="time the CUDA block operations beside a copy of the same bytes",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure to PATH")
    parser.add_argument("--share", type=float, default=0.4, help="share of high blocks (0.4)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("segblocks.bench: no CUDA device found; the kernels run on NVIDIA GPUs only")
    if not 0 <= options.share <= 1:
        sys.exit(f"segblocks.bench: --share must be between 0 and 1; got {options.share}")
    torch.manual_seed(0)
    results = []
    print(f"{'operation':22}{'shape':>14}{'batch':>6} {'dtype':9}", end="")
    print(f"{'MB':>9}{'us':>9}{'GB/s':>8}{'copy us':>9}{'ratio':>7}")
    for channels, block in [IMAGE, *LAYERS]:
        table = image_operations if (channels, block) == IMAGE else layer_operations
        for batch in BATCHES:
            for dtype in DTYPES:
                for name, make in table(channels, dtype).items():
                    r = measure(name, make, channels, block, batch, dtype, options.share)
                    results.append(r)
                    print(f"{r.operation:22}{r.shape:>14}{r.batch:>6} {r.dtype:9}", end="")
                    print(f"{r.megabytes:>9.1f}{r.time_us:>9.2f}{r.gb_per_s:>8.0f}", end="")
                    print(f"{r.copy_us:>9.2f}{r.ratio:>7.2f}", flush=True)
    other = bookkeeping(options.share)
    for name, value in other.items():
        print(f"{name}: {value} us")
    if options.json:
        record = {
            "command": ["python", "-m", "segblocks.bench", *(arguments or sys.argv[1:])],
            "versions": versions(),
            "grid": GRID,
            "share": options.share,
            "results": [asdict(r) for r in results],
            "bookkeeping_us": other,
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
