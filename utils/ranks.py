"""The processes of a run, as torchrun starts them: one rank a device."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from segblocks import Replicas


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run. Without torchrun there is one rank, which nothing waits for.

    `local` counts on this node, and `per_node` is how many run there.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    per_node: int = 1
    host: dist.ProcessGroup | None = field(default=None, compare=False)  # for what is on the CPU

    @property
    def main(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.rank == 0

    @property
    def replicas(self) -> Replicas:
        return Replicas(self.rank, self.count)

    def everyones(self, value: Any) -> list[Any]:
        """What each rank gave, on every rank, in order; plain values and CPU tensors."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.host)
        return values

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.count > 1:
            dist.barrier(group=self.host)


ALONE = Ranks()


class Agreement:
    """The largest number that any rank has given, known to all at the same step.

    With several ranks the answer is that of the step before, which has arrived in the meantime, so
    that nobody waits for it.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._under_way: tuple[torch.Tensor, Any] | None = None

    def __call__(self, number: int) -> int:
        if self.ranks.count == 1:
            return number
        before, given = self._under_way, torch.tensor(number)
        work = dist.all_reduce(given, dist.ReduceOp.MAX, group=self.ranks.host, async_op=True)
        self._under_way = given, work
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])

    def forget(self) -> None:
        """What is under way was given before the last answer was acted on. Call on all ranks."""
        if self._under_way is not None:
            self._under_way[1].wait()
            self._under_way = None


def ranks_of_environment() -> Ranks:
    """What torchrun (or anything that sets its variables) says about this process, not joined yet.

    Raises ValueError where only some of the variables are set.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} not set: start several processes "
            "with torchrun, or unset WORLD_SIZE"
        )
    rank, local, per_node = (int(os.environ[name]) for name in names[:3])
    return Ranks(rank, count, local, per_node)


def join(ranks: Ranks, device: torch.device) -> Ranks:
    """Meet the other ranks: NCCL between GPUs, gloo between CPUs and for what the host decides.

    NCCL_GRAPH_REGISTER is 0 unless it is set: with it, what NCCL does in a CUDA graph is not what
    it does outside one, and ranks replay graphs that were not captured together.
    """
    if ranks.count == 1:
        return ranks
    if device.type == "cuda":
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        dist.init_process_group("nccl", device_id=device)
        host = dist.new_group(backend="gloo")
    else:
        dist.init_process_group("gloo")
        host = dist.group.WORLD
    return Ranks(ranks.rank, ranks.count, ranks.local, ranks.per_node, host)


def leave() -> None:
    """Part from the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
