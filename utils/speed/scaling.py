"""Images per second of training steps, on one process or on several that share each batch.

What `scripts/scaling.py` starts with torchrun. Steps repeat one batch, so that it is steps that are
timed, with all that processes tell each other, and not the reading of a data set.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

import train
from argparser import parse_args
from utils.data import build_train_set, build_val_set, train_loader, val_loader
from utils.ranks import leave, ranks_of_environment
from utils.seeding import seed_everything
from utils.training.trainer import Trainer
from utils.versions import versions

ROUNDS = 5


def measure(flags: Sequence[str], images: int, warm_up: int, steps: int) -> dict[str, Any] | None:
    """Train as `train.py` does with these flags, on `images` a process in each batch.

    Args:
        warm_up, steps: optimiser steps before anything is timed, and in each of ROUNDS.

    Returns:
        Figures for JSON, by the clock of the first process; None in all others.
    """
    ranks = ranks_of_environment()
    whole = ["--batch-size", str(images * ranks.count)]
    args = parse_args(["--mode", "train", *flags, *whole])
    seed_everything(args.seed, args.deterministic)
    device, ranks = train.place(args)
    train_set, val_set = build_train_set(args, device), build_val_set(args)
    model = train.build(args, train_set).to(device)
    loaders = train_loader(train_set, args, ranks), val_loader(val_set, args, ranks)
    trainer = Trainer(model, *loaders, args, device, ranks)
    loaders[0].sampler.set_epoch(0, 0, 1)
    batch = next(iter(loaders[0]))
    if device.type == "cuda":  # as training has it
        batch = [x.pin_memory() for x in batch]

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        trainer.train_on(batch, steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds(warm_up)
    rates = [steps * trainer.images_per_step / seconds(steps) for _ in range(ROUNDS)]
    reserved = torch.cuda.max_memory_reserved(device) >> 20 if device.type == "cuda" else None
    trainer.close()
    leave()
    if not ranks.main:
        return None
    return {
        "processes": ranks.count,
        "images_per_second": statistics.median(rates),
        "rounds": rates,
        "reserved_memory_mib": reserved,
        "versions": versions(device),
    }
