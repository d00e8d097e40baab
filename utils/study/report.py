"""What a study found: raw figures as JSON, a Markdown table, a picture."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.study.plan import Experiment
from utils.validation.curve import NO_MATPLOTLIB, Line, budget_text, plot

CALIBRATED = "threshold fitted"
POLICY_KEYS = ("boundary_miou", "rank_correlation", "rank_correlation_pooled")


@dataclass(frozen=True)
class Row:
    """One setting of one experiment: figures of every seed that is there."""

    experiment: str
    title: str
    validation: str
    budget: float | int | None
    figures: list[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        """Of every seed; what was not measured is left out."""
        found = []
        for figures in self.figures:
            source = figures["policy_metrics"] or {} if key in POLICY_KEYS else figures
            if source.get(key) is not None:
                found.append(source[key])
        return found

    def mean(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def deviation(self, key: str) -> float | None:
        """Sample standard deviation over the seeds; None for one."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None


def gather(plan: Sequence[Experiment], folder: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Raw figures of every validation that is done, each with its experiment and seed."""
    found = []
    for experiment in plan:
        for seed in seeds:
            for validation in experiment.validations:
                place = folder / experiment.name / f"seed{seed}" / validation
                if (place / "done.json").exists():
                    training = _read(place.parent / "done.json")
                    origin = {
                        "experiment": experiment.name,
                        "title": experiment.title,
                        "seed": seed,
                        "validation": validation,
                        "training": training["command"],
                        "training_seconds": training["seconds"],
                    }
                    name = "curve.json" if (place / "curve.json").exists() else "val.json"
                    found.append(origin | _read(place / name))
    return found


def rows(raw: Sequence[dict[str, Any]]) -> list[Row]:
    """Seeds put together, curves taken apart, in the order of the study."""
    grouped: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for entry in raw:
        key = (entry["experiment"], entry["title"], entry["validation"])
        for figures in entry.get("budgets", [entry]):
            grouped[(*key, figures.get("budget"))].append(figures)
    return [Row(*key, figures) for key, figures in grouped.items()]


def markdown(found: Sequence[Row], runs: int) -> str:
    """The table of docs/study.md."""
    dense = next((row.mean("miou") for row in found if row.experiment == "dense"), None)
    lines = [
        f"{runs} training runs, each validated once, after its last epoch; nothing was selected. "
        "± is the sample standard deviation over seeds.",
        "",
        "| | budget | seeds | mIoU, % | to dense | high blocks, % | GMACs | mIoU at boundaries, % "
        "| rank correlation with the oracle |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        title = row.title
        if row.validation not in ("own", "curve", "budget"):
            is_placement = row.validation != "calibrated"
            title += f"; placed by {row.validation}" if is_placement else f"; {CALIBRATED}"
        behind = "–" if dense is None else f"{100 * (row.mean('miou') - dense):+.1f}"
        budget = "own" if row.budget is None else budget_text(row.budget)
        cells = [title, budget, str(len(row.figures)), _percent(row, "miou"), behind]
        cells += [_percent(row, "share"), f"{row.mean('gmacs'):.2f}"]
        rank = row.mean("rank_correlation")
        cells += [_percent(row, "boundary_miou"), "–" if rank is None else f"{rank:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def lines_of(found: Sequence[Row]) -> list[Line]:
    """What the picture shows: curves joined, single settings as points, spread as bars."""
    made: dict[str, Line] = {}
    for row in found:
        is_curve = row.validation == "curve"
        if not is_curve and row.validation not in ("own", "budget"):
            continue
        name = f"{row.title}: budgets" if is_curve else row.title
        line = made.setdefault(name, Line(name, joined=is_curve))
        spread = row.deviation("miou") or 0.0
        line.points.append((row.mean("gmacs"), 100 * row.mean("miou"), 100 * spread))
    for line in made.values():
        line.points.sort()
    return list(made.values())


def write_report(
    plan: Sequence[Experiment], folder: Path, seeds: Sequence[int], into: Path, dataset: str
) -> list[str]:
    """Write study_<dataset>.json, .md and .png; -> what to tell."""
    raw = gather(plan, folder, seeds)
    if not raw:
        return [f"nothing to report: no validation under {folder} is done"]
    into.mkdir(parents=True, exist_ok=True)
    runs = len({(entry["experiment"], entry["seed"]) for entry in raw})
    found = rows(raw)
    path = into / f"study_{dataset}.json"
    text = json.dumps({"runs": runs, "validations": raw}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    table = path.with_suffix(".md")
    table.write_text(markdown(found, runs), encoding="utf-8")
    told = [f"{runs} runs, {len(raw)} validations: {path}, {table}"]
    picture = path.with_suffix(".png")
    try:
        plot(lines_of(found), picture, f"SwiftNet-RN18 on {dataset}")
    except ModuleNotFoundError:
        return [*told, f"no {picture}: {NO_MATPLOTLIB}"]
    return [*told, f"picture: {picture}"]


def _percent(row: Row, key: str) -> str:
    mean, deviation = row.mean(key), row.deviation(key)
    if mean is None:
        return "–"
    return f"{100 * mean:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
