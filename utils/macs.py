"""Operations counted by torch on what is actually executed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode


class MacCounter:
    """Multiply-accumulates of forward passes of a SegBlocksModel.

    torch counts two floating-point operations for each multiply-accumulate, and nothing for
    element-wise work. It takes some hundred milliseconds a pass, so passes of one kind (image size
    and number of high blocks) are counted once; `known` keeps what was found, also for others.
    """

    def __init__(self, known: dict[Hashable, dict[str, float]] | None = None) -> None:
        self._known = {} if known is None else known
        self._passes: Counter[Hashable] = Counter()

    def add(self, kind: Hashable, run: Callable[[], Any]) -> None:
        """One more pass; `run()` executes one of this kind where it has not been counted yet."""
        if kind not in self._known:
            self._known[kind] = count(run)
        self._passes[kind] += 1

    def gmacs(self) -> dict[str, float]:
        """Mean GMACs of a pass under "total", and of policy, net.backbone, net.upsample, …"""
        sums: dict[str, float] = defaultdict(float)
        for kind, passes in self._passes.items():
            for name, macs in self._known[kind].items():
                sums[name] += passes * macs
        return {name: macs / self._passes.total() / 1e9 for name, macs in sums.items()}

    @classmethod
    def joined(cls, counters: "list[MacCounter]") -> "MacCounter":
        """All passes of several counters."""
        whole = cls()
        for counter in counters:
            whole._known.update(counter._known)
            whole._passes.update(counter._passes)
        return whole


def count(run: Callable[[], Any]) -> dict[str, float]:
    """Multiply-accumulates of what `run` executes: in total and of each part of the model."""
    mode = FlopCounterMode(display=False)
    with mode:
        run()
    counts = {name: sum(ops.values()) / 2 for name, ops in mode.get_flop_counts().items()}
    macs: dict[str, float] = defaultdict(float, total=counts.pop("Global", 0))
    for name, found in counts.items():
        part = part_of(name)
        # Containers such as ModuleList are never called, so their members are added up; what is
        # inside a module that is counted already is left out.
        if part and not any(part_of(a) and a in counts for a in ancestors(name)):
            macs[part] += found
    return dict(macs)


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
