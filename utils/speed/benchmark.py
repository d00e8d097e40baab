"""Speed mode: the network on blocks beside its dense baselines, in one run.

The timer holds policy, split, network and combine, and nothing else: the input is already on the
device. Engines take turns, so that a change of clock or of load meets all of them.
"""

import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dataloaders import SegmentationDataset
from utils.errors import UserError
from utils.inference import inference_copy, use_half
from utils.logger import RunLog, progress
from utils.macs import MacCounter
from utils.profiler import profiler
from utils.speed.engines import Engine, build_engines, can_compile, padding

# Passes of each engine; one of each image at least, as new counts of blocks are captured.
WARM_UP = 5
PROFILED = 6  # passes that --profiler needs


@dataclass
class Row:
    """Figures of one engine. Times are of one forward pass."""

    engine: str
    how: str
    p50_ms: float
    p95_ms: float
    images_per_second: float
    share: float  # of full-resolution blocks
    gmacs: float  # per image, policy included
    peak_memory_mib: float | None  # of one pass beyond weights and input; None on the CPU
    ratio: dict[str, float]  # how many times as fast as each baseline
    times_ms: list[float]


def benchmark(
    model: nn.Module,
    dataset: SegmentationDataset,
    args: Namespace,
    device: torch.device,
    log: RunLog,
) -> dict[str, Any]:
    """Time every engine on the first images of `dataset` at native size; -> figures for JSON."""
    half = use_half(args, device)
    model = inference_copy(model, half)
    images = load_images(dataset, args, device, torch.half if half else torch.float32)
    size = f"{images[0].shape[-1]}×{images[0].shape[-2]}"
    log.info(
        f"batches of {args.batch_size} at {size}, {'float16' if half else 'float32'}, "
        f"{len(images)} of them in turn, {args.speed_repeats} passes of each network"
    )
    if args.segblocks_policy != "disabled" and not can_compile(images[0]):
        log.info("compiled models work in half precision on CUDA: --fp16 yes times them")
    with torch.no_grad():
        log.info("preparing the networks")
        engines = build_engines(model, images[0], args)
        peaks = [_peak_memory(engine, images[0]) for engine in engines]
        times = _take_turns(engines, images, args.speed_repeats, device)
        work = _work(model, engines, images)
        if args.profiler:
            _profile(engines[-1], images, args, log)
    medians = {e.name: percentile(t, 50) for e, t in zip(engines, times)}
    rows = []
    for engine, peak, ms in zip(engines, peaks, times):
        share, gmacs = work[engine.name]
        p50 = medians[engine.name]
        ratio = {e.name: medians[e.name] / p50 for e in engines if e.is_baseline}
        rate = 1000 * args.batch_size / p50
        rows.append(
            Row(
                engine.name,
                engine.how,
                p50,
                percentile(ms, 95),
                rate,
                share,
                gmacs,
                peak,
                ratio,
                ms,
            )
        )
    for line in table(rows):
        log.info(line)
    return {
        "batch_size": args.batch_size,
        "budget": args.budget,
        "height": images[0].shape[-2],
        "width": images[0].shape[-1],
        "dtype": str(images[0].dtype).removeprefix("torch."),
        "rows": [asdict(row) for row in rows],
    }


def load_images(
    dataset: SegmentationDataset, args: Namespace, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Batches (N,3,H,W) of --batch-size images on the device: --speed-images of them, or as many
    as the data set fills. A batch larger than the data set repeats images.

    Raises UserError if the images differ in size.
    """
    count = max(1, min(args.speed_images, len(dataset) // args.batch_size))
    images = [dataset[i % len(dataset)][0] for i in range(count * args.batch_size)]
    sizes = {tuple(image.shape[-2:]) for image in images}
    if len(sizes) > 1:
        raise UserError(
            f"--mode speed needs images of one size, these are {sorted(sizes)} (height, width): "
            "time them one at a time with --batch-size 1 --speed-images 1"
        )
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    return [
        batch.to(device, dtype).contiguous(memory_format=layout)
        for batch in torch.stack(images).split(args.batch_size)
    ]


def table(rows: list[Row]) -> list[str]:
    """One line for each engine, under a header."""
    against = list(rows[0].ratio)
    header = f"{'':14}{'p50 ms':>9}{'p95 ms':>9}{'img/s':>9}{'high':>8}{'GMACs':>9}{'MiB':>8}"
    lines = [header + "".join(f"{'× ' + name:>15}" for name in against) + "  how"]
    for row in rows:
        memory = "–" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f}"
        lines.append(
            f"{row.engine:14}{row.p50_ms:9.3f}{row.p95_ms:9.3f}{row.images_per_second:9.1f}"
            f"{100 * row.share:7.1f}%{row.gmacs:9.2f}{memory:>8}"
            + "".join(f"{row.ratio[name]:15.2f}" for name in against)
            + f"  {row.how}"
        )
    return lines


def percentile(values: list[float], percent: float) -> float:
    """Linear between the closest ranks."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100))


def _take_turns(
    engines: list[Engine], images: list[torch.Tensor], repeats: int, device: torch.device
) -> list[list[float]]:
    """Milliseconds of each pass of each engine."""
    times: list[list[float]] = [[] for _ in engines]
    warm_up = max(WARM_UP, len(images))
    for turn in progress(range(warm_up + repeats), "time", "turn"):
        for engine, taken in zip(engines, times):
            engine.load(images[turn % len(images)])
            ms = _cuda_ms(engine) if device.type == "cuda" else _cpu_ms(engine)
            if turn >= warm_up:
                taken.append(ms)
    return times


def _cuda_ms(engine: Engine) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    engine.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _cpu_ms(engine: Engine) -> float:
    start = time.perf_counter()
    engine.run()
    return 1000 * (time.perf_counter() - start)


def _peak_memory(engine: Engine, image: torch.Tensor) -> float | None:
    """MiB that one pass allocates at its peak."""
    if not image.is_cuda:
        return None
    engine.load(image)
    engine.run()  # the first pass also fills caches
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.run()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before, engine.captured_bytes) / 2**20


def _work(
    model: nn.Module, engines: list[Engine], images: list[torch.Tensor]
) -> dict[str, tuple[float, float]]:
    """Mean share of full-resolution blocks and GMACs per image over `images`, by engine; counted in
    the eager network, as torch cannot count inside compiled ones."""
    known: dict[tuple, tuple[float, float]] = {}
    work = {}
    for engine in engines:
        key = (engine.on_blocks, repr(engine.budget))  # 1 is one block, 1.0 are all
        if key not in known:
            known[key] = _count(model, engine.on_blocks, engine.budget, images)
        work[engine.name] = known[key]
    return work


def _count(
    model: nn.Module, on_blocks: bool, budget: float | int | None, images: list[torch.Tensor]
) -> tuple[float, float]:
    macs, shares = MacCounter(), []
    for image in images:
        if on_blocks:
            run = partial(model, image, budget=budget)
        else:
            run = partial(model.net, padding(model)(image))
        result = run()
        macs.add(tuple(image.shape), int(result.grid.sum()) if on_blocks else None, run)
        shares.append(float(result.share) if on_blocks else 1.0)
    return sum(shares) / len(shares), macs.gmacs()["total"] / len(images[0])


def _profile(engine: Engine, images: list[torch.Tensor], args: Namespace, log: RunLog) -> None:
    with profiler(args, log) as profile:
        for turn in range(PROFILED):
            engine.load(images[turn % len(images)])
            engine.run()
            profile.step()
