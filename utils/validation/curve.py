"""One checkpoint at several budgets: a table, curve.json, and curve.png where it can be drawn."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.logger import RunLog
from utils.validation.evaluate import Evaluation

NO_MATPLOTLIB = "pictures of curves need matplotlib: pip install -r requirements-study.txt"


@dataclass
class Line:
    """One line of a plot: points (GMACs, mIoU in %, spread of the mIoU), and how to draw it."""

    name: str
    points: list[tuple[float, float, float]] = field(default_factory=list)
    joined: bool = True


def each_budget(args: Namespace) -> Iterator[Namespace]:
    """The arguments once for every --budget, as if it were the only one; as they are without."""
    for budget in args.budgets or [args.budget]:
        yield Namespace(**vars(args) | {"budget": budget})


def budget_text(budget: float | int | None) -> str:
    """40 % for a share, 51 blocks for a count."""
    if budget is None:
        return "own"
    if isinstance(budget, int):
        return "1 block" if budget == 1 else f"{budget} blocks"
    return f"{100 * budget:g} %"


def write_curve(
    evaluations: Sequence[Evaluation], args: Namespace, log: RunLog, origin: dict[str, Any]
) -> list[str]:
    """Write what validation found at each --budget to the run's folder; -> lines for the log.

    `origin` says how the figures came about, for their JSON.
    """
    rows = [{"budget": b} | e.to_json() for b, e in zip(args.budgets, evaluations)]
    lines = table(args.budgets, evaluations)
    lines.append(f"figures: {log.json('curve.json', origin | {'budgets': rows})}")
    points = [(e.gmacs, 100 * e.miou, 0.0) for e in evaluations]
    path = log.folder / "curve.png"
    try:
        plot([Line(args.name, sorted(points))], path, args.dataset)
    except ModuleNotFoundError:
        return [*lines, f"no curve.png: {NO_MATPLOTLIB}"]
    return [*lines, f"picture: {path}"]


def table(budgets: Sequence[float | int], evaluations: Sequence[Evaluation]) -> list[str]:
    """One line for each budget, under a header."""
    metrics = any(e.policy_metrics for e in evaluations)
    header = f"{'budget':>12}{'high':>9}{'mIoU':>9}{'GMACs':>9}"
    lines = [header + (f"{'boundary':>10}{'rank':>8}" if metrics else "")]
    for budget, e in zip(budgets, evaluations):
        line = f"{budget_text(budget):>12}{100 * e.share:8.1f}%{100 * e.miou:8.2f}%{e.gmacs:9.2f}"
        if e.policy_metrics:
            line += f"{100 * e.policy_metrics.boundary_miou:9.2f}%"
            line += f"{e.policy_metrics.rank_correlation:8.3f}"
        lines.append(line)
    return lines


def plot(lines: Sequence[Line], path: Path, title: str) -> None:
    """mIoU against GMACs to a PNG. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(8, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for line in lines:
        gmacs, miou, spread = zip(*line.points)
        style = "o-" if line.joined else "o"
        axes.errorbar(gmacs, miou, spread, fmt=style, capsize=3, label=line.name)
    axes.set(xlabel="GMACs per image, policy included", ylabel="mIoU, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
