"""Operations counted by torch on what is actually executed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from fractions import Fraction
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

Counts = dict[str, int | float]  # multiply-accumulates of the whole, "total", and of each part


class MacCounter:
    """Multiply-accumulates of forward passes of a SegBlocksModel.

    torch counts two floating-point operations for each multiply-accumulate, and nothing for
    element-wise work. That takes some hundred milliseconds a pass, so of each image size two passes
    are counted: every block of one resolution costs the same, so that two numbers of high blocks
    tell what all others cost. `known` keeps what was found, also for others.
    """

    def __init__(self, known: dict[Hashable, dict[int | None, Counts]] | None = None) -> None:
        self._known = {} if known is None else known
        self._passes: Counter[tuple[Hashable, int | None]] = Counter()

    def add(self, size: Hashable, n_high: int | None, run: Callable[[], Any]) -> None:
        """One more pass on images of this size; `run()` executes one such where that has to be
        counted. `n_high`: high blocks; None for a network without any."""
        counted = self._known.setdefault(size, {})
        if n_high not in counted and len(counted) < 2:
            counted[n_high] = count(run)
        self._passes[size, n_high] += 1

    def gmacs(self) -> Counts:
        """Mean GMACs of a pass under "total", and of policy, net.backbone, net.upsample, …"""
        sums: Counts = defaultdict(float)
        for (size, n_high), passes in self._passes.items():
            for name, macs in _of(self._known[size], n_high).items():
                sums[name] += passes * macs
        return {name: macs / self._passes.total() / 1e9 for name, macs in sums.items()}

    @classmethod
    def joined(cls, counters: "list[MacCounter]") -> "MacCounter":
        """All passes of several counters."""
        whole = cls()
        for counter in counters:
            for size, counted in counter._known.items():
                whole._known.setdefault(size, {}).update(counted)
            whole._passes.update(counter._passes)
        return whole


def _of(counted: dict[int | None, Counts], n_high: int | None) -> Counts:
    """Of a pass with so many high blocks; from the two counted ones, if it is not one of them."""
    if n_high in counted:
        return counted[n_high]
    (one, first), (two, second), *_ = counted.items()
    share = Fraction(n_high - one, two - one)
    names = first.keys() | second.keys()
    return {x: float(first[x] + share * (second[x] - first[x])) for x in names}


def count(run: Callable[[], Any]) -> Counts:
    """Multiply-accumulates of what `run` executes: in total and of each part of the model."""
    mode = FlopCounterMode(display=False)
    with mode:
        run()
    counts = {name: sum(ops.values()) // 2 for name, ops in mode.get_flop_counts().items()}
    macs: Counts = defaultdict(int, total=counts.pop("Global", 0))
    for name, found in counts.items():
        part = part_of(name)
        # Containers such as ModuleList are never called, so their members are added up; what is
        # inside a module that is counted already is left out.
        if part and not any(part_of(a) and a in counts for a in ancestors(name)):
            macs[part] += found
    return macs


def part_of(name: str) -> str:
    """The part of a SegBlocksModel that a module belongs to: "policy", or a child of its network;
    "" for the whole. `name` begins with the class, as in "SegBlocksModel.net.backbone.layer1"."""
    parts = name.split(".")[1:]
    depth = 1 if parts[:1] == ["policy"] else 2
    return ".".join(parts[:depth]) if len(parts) >= depth else ""


def ancestors(name: str) -> list[str]:
    """Of "A.b.c": ["A.b", "A"]."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
