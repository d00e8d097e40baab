"""Speed of a network as it is and on blocks: eager forward passes and training steps.

    python -m segblocks.bench_steps --net models:build_model \\
        --arguments '{"backbone": "resnet18", "num_classes": 19}' --json steps.json

`--net` is any callable that returns a network, image (N, 3, H, W) → logits (N, classes, h, w).
Inference is without policy, for a random grid, in the precision of `--eager-dtype`. A training step
is forward, cross-entropy of the logits enlarged to the image, backward and Adam; on blocks the
policy, its REINFORCE loss and the bookkeeping of the grid are in it, with exactly `--share` of the
blocks high. On CUDA both also run from `TrainingGraphs`. The variants take turns, so that a busy
machine slows all.

For each: the median and the 95th percentile in milliseconds of a call; the median that the host
took before it waited; the peak of the memory in MiB that PyTorch took from CUDA for it. Forward
passes are waited for one by one, training steps in rows of `--row`, as a training loop goes on
without waiting. Ratios are to the faster dense variant, of memory to the smaller.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .graphs import TrainingGraphs
from .grid import BlockGrid
from .model import SegBlocksModel, SegBlocksOutput, execute_with_grid
from .policy import build_policy

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    what: str
    variant: str  # "dense", "blocks", "dense graphs", "blocks graphs"
    precision: str
    median_ms: float
    p95_ms: float
    host_ms: float
    peak_mib: float | None
    against_dense: float
    memory_against_dense: float | None = None


def load(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The network that `module:callable` builds.

    Raises:
        ValueError: a name of another form; ImportError, AttributeError: nothing of that name.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise ValueError(f"--net must be module:callable, as in models:build_model; got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return getattr(importlib.import_module(module), function)(**arguments)


def random_grid(batch: int, size: tuple[int, int], block: int, share: float, device) -> Tensor:
    """(N, Gh, Gw) bool with `share` of each image's blocks True."""
    cells = (size[0] // block) * (size[1] // block)
    scores = torch.rand(batch, cells, device=device)
    order = scores.argsort(dim=1).argsort(dim=1)
    return (order < round(share * cells)).view(batch, size[0] // block, size[1] // block)


def forward_calls(net: nn.Module, options: argparse.Namespace) -> dict[str, Callable]:
    """Inference, by variant."""
    dtype = getattr(torch, options.eager_dtype)
    net = net.eval().to(options.device, dtype, memory_format=torch.channels_last)
    image = _image(1, options.eager_size, options).to(dtype)
    grid = random_grid(1, options.eager_size, options.block, options.share, options.device)
    count = int(grid.sum())

    def dense() -> None:
        with torch.no_grad():
            net(image)

    def blocks() -> None:
        with torch.no_grad():
            execute_with_grid(net, image, BlockGrid.from_mask(grid, count))

    return {"dense": dense, "blocks": blocks}


def training_calls(
    net: nn.Module, precision: str, options: argparse.Namespace
) -> dict[str, Callable]:
    """A training step, by variant. All train the same network."""
    policy = build_policy("reinforce", options.block, percent_target=options.share)
    model = SegBlocksModel(net, policy)
    dense = SegBlocksModel(net, build_policy("disabled", options.block))
    model.train().float().to(options.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=options.device.type == "cuda")
    image = _image(options.batch, options.train_size, options)
    labels = torch.zeros(image.shape[0], *image.shape[2:], dtype=torch.long, device=image.device)
    valid = torch.ones_like(labels, dtype=torch.bool)
    dtype = PRECISIONS[precision]
    losses = {m: partial(_objective, m) for m in (model, dense)}

    def step(model: SegBlocksModel, budget: float | None, graphs: TrainingGraphs | None) -> None:
        model.train_from_graphs(graphs)
        with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
            loss = model(image, budget, objective=losses[model], targets=(labels, valid))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    calls = {"dense": partial(step, dense, None, None)}
    calls["blocks"] = partial(step, model, options.share, None)
    if options.device.type == "cuda":
        calls["dense graphs"] = partial(step, dense, None, TrainingGraphs())
        calls["blocks graphs"] = partial(step, model, options.share, TrainingGraphs())
    calls["blocks"]()  # Adam's moments are no variant's own
    return calls


def _objective(
    model: SegBlocksModel, result: SegBlocksOutput, labels: Tensor, valid: Tensor
) -> Tensor:
    losses = ops.pixel_cross_entropy(result.logits, labels)
    return losses.mean() + model.policy.loss(result, losses, valid)[0]


def measure(
    what: str, precision: str, calls: dict[str, Callable], options: argparse.Namespace, row: int
) -> list[Result]:
    """Time `row` calls of each by turns."""
    waits: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    cuda = options.device.type == "cuda"
    peaks = {name: _warm_up(call, options.warm_up, cuda) for name, call in calls.items()}
    for _ in range(options.repeats):
        for name, call in calls.items():
            host, whole = _time(call, row, cuda)
            hosts[name].append(host)
            waits[name].append(whole)
    dense = [name for name in calls if name.startswith("dense")]
    fastest = min(statistics.median(waits[name]) for name in dense)
    smallest = min(peaks[name] for name in dense) if cuda else None
    results = []
    for name in calls:
        median = statistics.median(waits[name])
        ordered = sorted(waits[name])
        results.append(
            Result(
                what,
                name,
                precision,
                round(median, 3),
                round(ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))], 3),
                round(statistics.median(hosts[name]), 3),
                round(peaks[name], 1) if cuda else None,
                round(median / fastest, 3),
                round(peaks[name] / smallest, 3) if cuda else None,
            )
        )
    return results


def _time(call: Callable, row: int, cuda: bool) -> tuple[float, float]:
    """Milliseconds a call until the last of them returned, and until the device was done."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(row):
        call()
    returned = time.perf_counter()
    if cuda:
        torch.cuda.synchronize()
    done = time.perf_counter()
    return (returned - start) * 1e3 / row, (done - start) * 1e3 / row


def _warm_up(call: Callable, times: int, cuda: bool) -> float | None:
    """-> the most memory in MiB that PyTorch held for the call, beside what was there before."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
    for _ in range(times):
        call()
    if not cuda:
        return None
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_reserved() - before) / 2**20


def _image(batch: int, size: tuple[int, int], options: argparse.Namespace) -> Tensor:
    image = torch.randn(batch, 3, *size, device=options.device)
    return image.contiguous(memory_format=torch.channels_last)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, as in 1024x2048")
    return int(height), int(width)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m segblocks.bench_steps",
        description="time a network as it is and on blocks: eager inference and training steps",
    )
    parser.add_argument(
        "--net", required=True, metavar="MODULE:CALLABLE", help="builds the network"
    )
    parser.add_argument("--arguments", type=json.loads, default={}, help="its arguments, as JSON")
    parser.add_argument(
        "--parts", nargs="+", choices=["eager", "train"], default=["eager", "train"]
    )
    parser.add_argument("--share", type=float, default=0.4, help="share of high blocks (0.4)")
    parser.add_argument("--block", type=int, default=128, help="side of a block in pixels (128)")
    parser.add_argument("--eager-size", type=_size, default=(1024, 2048), metavar="HxW")
    parser.add_argument("--eager-dtype", choices=list(PRECISIONS), default="float16")
    parser.add_argument("--train-size", type=_size, default=(1024, 1024), metavar="HxW")
    parser.add_argument("--batch", type=int, default=8, help="images of a training step (8)")
    parser.add_argument(
        "--train-precision", nargs="+", choices=list(PRECISIONS), default=["float32", "bfloat16"]
    )
    parser.add_argument("--repeats", type=int, default=50, help="times that each is timed (50)")
    parser.add_argument("--row", type=int, default=5, help="training steps timed together (5)")
    parser.add_argument("--warm-up", type=int, default=5, help="calls before those (5)")
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure to PATH")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    for height, width in (options.eager_size, options.train_size):
        if height % options.block or width % options.block:
            parser.error(f"{height}x{width} is not made of whole {options.block}-pixel blocks")
    if not 0 <= options.share <= 1 or min(options.repeats, options.row) < 1:
        parser.error("--share must be between 0 and 1, --repeats and --row at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    results = []
    head = ("", "", "precision", "median ms", "p95 ms", "host ms", "peak MiB", "x dense", "memory")
    print("{:8}{:14}{:>10}{:>11}{:>10}{:>10}{:>10}{:>9}{:>8}".format(*head))

    def report(what: str, precision: str, calls: dict[str, Callable], row: int = 1) -> None:
        for r in measure(what, precision, calls, options, row):
            results.append(r)
            memory = ("-", "-") if r.peak_mib is None else (r.peak_mib, r.memory_against_dense)
            print(
                f"{what:8}{r.variant:14}{precision:>10}{r.median_ms:>11.3f}{r.p95_ms:>10.3f}",
                end="",
            )
            print(
                f"{r.host_ms:>10.3f}{memory[0]:>10}{r.against_dense:>9.3f}{memory[1]:>8}",
                flush=True,
            )

    if "eager" in options.parts:
        net = load(options.net, options.arguments)
        report("eager", options.eager_dtype, forward_calls(net, options))
    if "train" in options.parts:
        for precision in options.train_precision:
            net = load(options.net, options.arguments)
            report("train", precision, training_calls(net, precision, options), options.row)
    if options.json:
        cuda = options.device.type == "cuda"
        record = {
            "command": ["python", "-m", "segblocks.bench_steps", *(arguments or sys.argv[1:])],
            "device": torch.cuda.get_device_name() if cuda else platform.processor(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "python": platform.python_version(),
            "tf32": {
                "convolution": torch.backends.cudnn.allow_tf32,
                "matmul": torch.backends.cuda.matmul.allow_tf32,
            },
            "results": [asdict(r) for r in results],
        }
        options.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
