"""Random numbers of a run: seeds, and states to save and restore."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed torch on every device; `deterministic` also picks repeatable CUDA algorithms.

    cuDNN chooses them by its rules and not by trying them out: with blocks every number of high
    blocks is a shape of its own, to be tried out anew, for nothing that could be measured.
    """
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory before it is written; filling it would be one more pass each.
        torch.utils.deterministic.fill_uninitialized_memory = False


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the generators a training run draws from, as plain tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo of `rng_state`. A run that moves from CPU to CUDA keeps that device's present state."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def forked_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from `seed` inside; outside, nothing has been drawn."""
    before = rng_state(device)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_rng_state(before, device)
