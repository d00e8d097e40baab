"""Operations counted by torch on what is actually executed."""

from collections import defaultdict
from typing import Self

from torch.utils.flop_counter import FlopCounterMode


class MacCounter:
    """Multiply-accumulates of the forward passes of a SegBlocksModel inside `with counter:`.

    torch counts two floating-point operations for each multiply-accumulate, and nothing for
    element-wise work.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._macs: dict[str, float] = defaultdict(float)

    def __enter__(self) -> Self:
        self._mode = FlopCounterMode(display=False)
        self._mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)
        self._passes += 1
        counted = self._mode.get_flop_counts()
        del self._mode  # what is left can be sent to another process
        counts = {name: sum(ops.values()) / 2 for name, ops in counted.items()}
        self._macs["total"] += counts.pop("Global", 0)
        for name, macs in counts.items():
            part = part_of(name)
            # Containers such as ModuleList are never called, so their members are added up; what
            # is inside a module that is counted already is left out.
            if part and not any(part_of(a) and a in counts for a in ancestors(name)):
                self._macs[part] += macs

    def gmacs(self) -> dict[str, float]:
        """Mean GMACs of a pass under "total", and of policy, net.backbone, net.upsample, …"""
        return {name: macs / self._passes / 1e9 for name, macs in self._macs.items()}

    @classmethod
    def joined(cls, counters: "list[MacCounter]") -> "MacCounter":
        """All passes of several counters."""
        whole = cls()
        for counter in counters:
            whole._passes += counter._passes
            for name, macs in counter._macs.items():
                whole._macs[name] += macs
        return whole


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
