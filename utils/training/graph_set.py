"""CUDA graphs of a run that are released together."""

from typing import Protocol


class Releasable(Protocol):
    def release(self) -> None: ...


class GraphSet:
    """Whoever has graphs.

    It stands between those who find that graphs are void and those whose graphs these are, so that
    neither has to refer to the training loop, which would live on with its data workers.
    """

    def __init__(self) -> None:
        self._members: list[Releasable] = []

    def add(self, member: Releasable) -> None:
        self._members.append(member)

    def release(self) -> None:
        """Destroy all graphs, with their memory; what occurs again is captured anew."""
        for member in self._members:
            member.release()

    def close(self) -> None:
        """The same for the last time."""
        self.release()
        self._members.clear()
