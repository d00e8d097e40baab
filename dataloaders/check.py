"""Read every file of a data set and report what is there and what cannot be used.

    python -m dataloaders.check --dataset camvid --camvid-data-dir /data/camvid
    python -m dataloaders.check --dataset mapillary --splits train val --json mapillary.json

Prints, for each split, number and sizes of images, how frequent each class is, and every file that
is missing, unreadable or wrong. The exit status is 1 if there is any. The JSON report also holds
class weights (median frequency balancing over the first split), which `train.py --class-weights`
reads.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from argparser import Parser, data_flags
from dataloaders.base import SegmentationDataset
from dataloaders.files import PairedFiles
from dataloaders.registry import build_dataset, find_dataset
from dataloaders.survey import Survey, survey
from utils.class_weights import ENTRY, median_frequency_weights
from utils.data import workers
from utils.errors import UserError, user_errors
from utils.flags.conflicts import missing_folder

SIZES_SHOWN = 10


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m dataloaders.check",
        description="Read every file of a data set and report sizes, class frequencies and "
        "whatever cannot be used. The exit status is 1 if there is anything.",
    )
    data_flags(parser.add_argument_group("data"))
    # fmt: off
    parser.add_argument("--splits", nargs="+", default=["train", "val"], metavar="SPLIT",
        help="what to read (default: train val)")
    parser.add_argument("--json", default=None, metavar="FILE",
        help="write the report there too, with class weights for train.py --class-weights")
    # fmt: on
    args = parser.parse_args(argv)
    args.synthetic_size = tuple(args.synthetic_size)
    if problem := missing_folder(args):
        parser.error(problem)
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist; make it first")
    return args


def open_split(args: argparse.Namespace, split: str) -> SegmentationDataset:
    """The split, without an error for labels that are missing: reading finds them all."""
    kind = find_dataset(args.dataset)
    options = kind.options(args, split)
    if issubclass(kind, PairedFiles):
        options["allow_missing"] = True
    return build_dataset(args.dataset, split, **options)


def report(found: Survey) -> list[str]:
    """Lines for people."""
    labelled = found.pixels.total()
    total = max(1, labelled + found.ignored)
    sizes = found.sizes.most_common()
    shown = [f"{w}×{h} ({count})" for (w, h), count in sizes[:SIZES_SHOWN]]
    more = f" and {len(sizes) - SIZES_SHOWN} other sizes" if len(sizes) > SIZES_SHOWN else ""
    width = max(map(len, [*found.pixels, "ignored"]))
    lines = [f"  {found.images} images: {', '.join(shown) or 'none readable'}{more}"]
    lines.append(f"  {'':{width}}  {'of labelled':>12}  {'images':>7}")
    for name, count in found.pixels.items():
        share = 100 * count / max(1, labelled)
        lines.append(f"  {name:{width}}  {share:10.3f} %  {found.shown_in[name]:7}")
    lines.append(f"  {'ignored':{width}}  {100 * found.ignored / total:10.3f} % of all pixels")
    absent = [name for name, count in found.pixels.items() if not count]
    if absent:
        lines.append(f"  never labelled: {', '.join(absent)}")
    lines.append(f"  faults: {len(found.faults) or 'none'}")
    return lines + [f"    {fault}" for fault in found.faults]


def run(args: argparse.Namespace) -> int:
    """Survey the splits; -> the number of faults. Raises UserError where a split cannot start."""
    with user_errors():
        datasets = {split: open_split(args, split) for split in dict.fromkeys(args.splits)}
    surveys: dict[str, Survey] = {}
    for split, dataset in datasets.items():
        surveys[split] = survey(dataset, workers(args))
        print(f"{args.dataset}/{split}", *report(surveys[split]), sep="\n", flush=True)
    if args.json:
        with user_errors(), open(args.json, "w", encoding="utf-8") as file:
            json.dump(to_json(args.dataset, surveys), file, indent=1)
    return sum(len(found.faults) for found in surveys.values())


def to_json(dataset: str, surveys: dict[str, Survey]) -> dict[str, Any]:
    """The whole report; class weights come from the first split."""
    first = next(iter(surveys.values()))
    return {
        "dataset": dataset,
        "splits": {split: found.to_json() for split, found in surveys.items()},
        ENTRY: median_frequency_weights(first.pixels, first.pixels_of_images),
    }


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 1 if anything is wrong with the data."""
    try:
        return 1 if run(parse_args(argv)) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
