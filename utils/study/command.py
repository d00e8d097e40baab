"""Train and validate every experiment of a study, several side by side, and put results together.

    python scripts/study.py --dataset camvid --parallel 8 --camvid-data-dir /data/camvid
    python scripts/study.py --dataset synthetic --only headline --seeds 0
    python scripts/study.py --dataset camvid --list
    python scripts/study.py --dataset camvid --report-only --report-dir docs/benchmarks

The same command again goes on where it stopped: trainings from their checkpoints, validations from
the first that is missing. Every experiment is a run of train.py with the hyperparameters of
configs/<dataset>/swiftnet_rn18/baseline_train.sh; flags that this script does not know go to all.
"""

import argparse
import os
import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from utils.study.plan import RECIPES, SETUPS, Experiment, chosen, experiments
from utils.study.report import write_report
from utils.study.runs import ROOT, Options, Runner, Step, steps


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="study.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed is a flag of train.py, not short for --seeds
    )
    add = parser.add_argument
    add("--dataset", choices=SETUPS, default="camvid")
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="experiments or groups (headline, recipe); default: all",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="of the headline experiments; the others run with the first (default: 0 1 2)",
    )
    add(
        "--recipe",
        choices=RECIPES,
        default=None,
        help="how the learned policies of the headline are trained (default: "
        + ", ".join(f"{setup.recipe} for {name}" for name, setup in SETUPS.items())
        + ")",
    )
    add(
        "--epochs",
        type=int,
        default=None,
        metavar="N",
        help="of every training (default: by data set)",
    )
    add("--parallel", type=int, default=4, metavar="J", help="runs side by side (default: 4)")
    add(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="data processes of each run (default: cores / J, at most 7)",
    )
    add(
        "--minutes",
        type=float,
        default=0,
        metavar="MIN",
        help="save and stop after this time (default: 0, never)",
    )
    add(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder of the runs (default: exp/study/DATASET)",
    )
    add(
        "--report-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="where study_DATASET.json, .md and .png go (default: the folder of the runs)",
    )
    add(
        "--train-flags",
        default="",
        metavar="FLAGS",
        help="more flags of train.py for trainings alone, in quotes",
    )
    add("--report-only", action="store_true", help="run nothing, report what is there")
    add("--list", action="store_true", help="print the commands that are left, run nothing")
    args, flags = parser.parse_known_args(argv)  # fmt: skip
    args.recipe = args.recipe or SETUPS[args.dataset].recipe
    if args.parallel < 1 or (args.epochs is not None and args.epochs < 1):
        parser.error("--parallel and --epochs take numbers of at least 1")
    return args, flags


def main(argv: list[str] | None = None) -> int:
    """0 when everything is done, 1 when something failed or is left."""
    args, flags = parse(argv)
    out = (args.out or ROOT / "exp" / "study" / args.dataset).resolve()
    try:
        plan = chosen(experiments(args.dataset, args.recipe, args.epochs), args.only)
        chains = all_steps(plan, args, flags, out)
        if args.list:
            left = [step for chain in chains for step in chain if not step.is_done()]
            with suppress(BrokenPipeError):  # of `head`, say
                print("\n".join(shlex.join(step.command) for step in left), flush=True)
            return 0
        finished = count_left(chains) == 0 if args.report_only else run(chains, args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in write_report(plan, out, args.seeds, args.report_dir or out, args.dataset):
        print(line)
    return 0 if finished else 1


def all_steps(
    plan: list[Experiment], args: argparse.Namespace, flags: list[str], out: Path
) -> list[list[Step]]:
    """One chain a run, first seeds first."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, (cores or 1) // args.parallel)
    setup = SETUPS[args.dataset]
    options = Options(
        dataset=args.dataset,
        setup=setup,
        epochs=args.epochs or setup.epochs,
        folder=out,
        workers=min(7, share) if args.workers is None else args.workers,
        flags=tuple(flags),
        train_flags=tuple(args.train_flags.split()),
    )
    runs = [(e, s) for s in args.seeds for e in plan if e.seeded or s == args.seeds[0]]
    return [steps(experiment, seed, options) for experiment, seed in runs]


def visible_devices() -> list[str]:
    """The CUDA devices to spread runs over, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if given is None else [name for name in given.split(",") if name]
    return names or [str(i) for i in range(torch.cuda.device_count())]


def count_left(chains: list[list[Step]]) -> int:
    """Trainings and validations that are not done. Raises ValueError where `Step.is_done` does."""
    return sum(not step.is_done() for chain in chains for step in chain)


def run(chains: list[list[Step]], args: argparse.Namespace) -> bool:
    """Whether all is done."""
    left = count_left(chains)
    print(f"{len(chains)} runs, {left} trainings and validations left", flush=True)
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    tell = partial(print, flush=True)
    runner = Runner(args.parallel, threads, tell, visible_devices())
    finished = runner.run(chains, args.minutes)
    if runner.failed:
        print(f"failed: {', '.join(runner.failed)}", file=sys.stderr)
    elif not finished:
        print("not everything is done: the same command goes on from there", file=sys.stderr)
    return finished
