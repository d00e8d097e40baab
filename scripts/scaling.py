"""Images per second of training on 1, 2, 4 processes, each with as many images in a batch.

    python scripts/scaling.py --processes 1 2 4 --json scaling.json -- \\
        --segblocks-policy reinforce --segblocks-percent-target 0.4 --amp bf16

What follows `--` are flags of train.py, but for --batch-size; without any, SwiftNet-RN18 trains
dense, from random weights, on synthetic crops of 1024×1024. GPUs are used where there are any, one
a process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

FLAGS = (
    "--dataset synthetic --synthetic-size 1024 2048 --synthetic-val-images 2 --res 2048 "
    "--crop-res 1024 --num-workers 0 --pretrain-backbone no"
)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    own, flags = split_at_dashes(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    add("--images", type=int, default=8, metavar="N", help="a process in a batch (default: 8)")
    add(
        "--warm-up",
        type=int,
        default=60,
        metavar="N",
        help="optimiser steps before anything is timed (default: 60)",
    )
    add("--steps", type=int, default=20, metavar="N", help="in each of five rounds (default: 20)")
    add("--json", type=Path, metavar="FILE", help="for the figures")
    add("--worker", type=Path, help=argparse.SUPPRESS)  # its figures go there
    args = parser.parse_args(own)  # fmt: skip
    if min(args.images, args.steps, *args.processes) < 1 or args.warm_up < 0:
        parser.error("--processes, --images and --steps are at least 1, --warm-up at least 0")
    if any(flag.startswith("--batch-size") for flag in flags):
        parser.error("--batch-size is what --images make of all processes: give --images")
    if args.worker is not None:
        return work(args, flags)
    runs = []
    for count in args.processes:
        figures = started(args, count, flags)
        if figures is None:
            print(f"scaling: {count} processes failed, see above", file=sys.stderr)
            break
        runs.append(figures)
        print(f"{count} processes: {figures['images_per_second']:.1f} images/s", flush=True)
    if runs:
        print("\n".join(table(runs)))
    if runs and args.json is not None:
        figures = {"command": ["python", "scripts/scaling.py", *argv], "flags": FLAGS, "runs": runs}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return int(len(runs) < len(args.processes))


def split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def started(args: argparse.Namespace, count: int, flags: list[str]) -> dict | None:
    """The figures of so many processes; None where they fail."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "figures.json")
        own = ["--images", args.images, "--warm-up", args.warm_up, "--steps", args.steps]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        command = [*torchrun, __file__, "--worker", found, *own, "--", *flags]
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT)
        return None if done.returncode else json.loads(found.read_text(encoding="utf-8"))


def work(args: argparse.Namespace, flags: list[str]) -> int:
    """In each process of torchrun."""
    from utils.speed.scaling import measure

    scenes = ["--synthetic-train-images", str(args.images * int(os.environ["WORLD_SIZE"]))]
    given = [*FLAGS.split(), *scenes, *flags]
    figures = measure(given, args.images, args.warm_up, args.steps)
    if figures is not None:
        args.worker.write_text(json.dumps(figures), encoding="utf-8")
    return 0


def table(runs: list[dict]) -> list[str]:
    """Images per second, and what they are of those of the first run times its processes."""
    first = runs[0]["images_per_second"] / runs[0]["processes"]
    lines = [f"{'processes':>10}{'images/s':>12}{'of linear, %':>14}{'reserved MiB':>14}"]
    for run in runs:
        rate, memory = run["images_per_second"], run["reserved_memory_mib"]
        share = 100 * rate / (first * run["processes"])
        lines.append(f"{run['processes']:10}{rate:12.1f}{share:14.1f}{memory or '-':>14}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
