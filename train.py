"""Train, validate or time SwiftNet with dynamic resolution by blocks.

Synthetic street scenes are drawn on the fly, so these run anywhere:

    python train.py --dataset synthetic --synthetic-size 256 512 --res 512 --crop-res 256 \
        --pretrain-backbone no --segblocks-policy reinforce --segblocks-block-size 64 \
        --segblocks-percent-target 0.4 --epochs 2 --name try
    python train.py --mode val --dataset synthetic --synthetic-size 256 512 --name try \
        --segblocks-policy reinforce --segblocks-block-size 64 --resume-best yes --viz policy pred
    python train.py --mode speed --dataset synthetic --synthetic-size 256 512 --name try \
        --segblocks-policy reinforce --segblocks-block-size 64 --resume-best yes
    tensorboard --logdir exp/try

The experiments of the paper are scripts in configs/; any flag may be added to them. `python
train.py --help` lists the flags.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import segblocks
from argparser import parse_args
from dataloaders import DataError, SegmentationDataset
from models import build_model
from segblocks.peers import peers_on
from utils.checkpoint import load_weights
from utils.data import (
    build_calibration_set,
    build_train_set,
    build_val_set,
    train_loader,
    val_loader,
)
from utils.errors import OUT_OF_MEMORY, UserError, one_line, user_errors
from utils.logger import RunLog, command_line
from utils.published import settle_upsampling
from utils.ranks import ALONE, Ranks, join, leave, ranks_of_environment
from utils.seeding import seed_everything
from utils.speed.benchmark import benchmark
from utils.training.resume import find_checkpoint, folder_of, is_auto, other_blocks, resume
from utils.training.signals import Stopped
from utils.training.trainer import Trainer
from utils.validation.calibrate import calibrate
from utils.validation.curve import budget_text, each_budget, write_curve
from utils.validation.evaluate import Kept, evaluate
from utils.versions import versions

SMALLEST_BLOCK = 64  # twice the stride of a backbone's deepest features
# Threads that write checkpoints and pictures give way to the one that trains after so long. Each
# time that launches something or waits it lets the others run, dozens of times a step; Python's
# default is ten times as long, as long as a whole step on small images.
SWITCH_SECONDS = 0.0005


def train(args: Namespace) -> None:
    with user_errors():  # nothing is written before all of this has worked
        device, ranks = place(args)
        train_set, val_set = build_train_set(args, device), build_val_set(args)
        pretrained = args.pretrain_backbone and find_checkpoint(args) is None
        model = build(args, train_set, pretrained).to(device)
        loaders = train_loader(train_set, args, ranks), val_loader(val_set, args, ranks)
        trainer = Trainer(model, *loaders, args, device, ranks)
        if args.segblocks_calibrate == "val":
            trainer.validations.calibration_set = val_set
        elif args.segblocks_calibrate == "train":
            trainer.validations.calibration_set = build_calibration_set(args)
        told = resume(trainer, args)
        check_same_start(trainer, ranks)
        log = RunLog(folder_of(args), tensorboard=True, quiet=not ranks.main)
    with log:
        log.command()
        log.info(
            f"{len(train_set)} training and {len(val_set)} validation images; {device}, "
            f"{ranks.count} process{'es' * (ranks.count > 1)}"
        )
        if ranks.count > 1 and device.type == "cuda":
            reached = peers_on(device.index) is not None
            log.info(
                f"batch norm is exchanged {'in memory of the GPUs' if reached else 'over NCCL'}"
            )
        for name, dataset in (("training", train_set), ("validation", val_set)):
            if dataset.decoded:
                log.info(f"decoded {name} images stay in memory")
        for line in told.lines:
            log.info(line)
        for line in told.warnings:
            log.warning(f"warning: {line}")
        if trainer.fit(log) is None:
            log.info("nothing left to train: raise --epochs or --max-steps, or --resume none")
        best = trainer.progress
        log.info(f"best mIoU {100 * best.score_best:.2f} % after epoch {best.score_best_epoch + 1}")


def validate(args: Namespace) -> None:
    device, ranks, val_set, model, path, log = trained(args)
    with log:
        log.info(f"validating {path} on {len(val_set)} images; {device}")
        loader = val_loader(val_set, args, ranks)
        if args.segblocks_calibrate != "no":
            with user_errors():
                log.info(calibrate(model, build_calibration_set(args), args, device))
        if len(args.budgets) > 1:
            kept, runs = Kept(args, device), each_budget(args)
            found = [evaluate(model, loader, x, device, log, ranks=ranks, kept=kept) for x in runs]
            if ranks.main:
                for line in write_curve(found, args, log, origin(path, device)):
                    log.info(line)
            return
        evaluation = evaluate(model, loader, args, device, log, ranks=ranks)
        for line in evaluation.lines():
            log.info(line)
        if ranks.main:
            figures = origin(path, device) | {"budget": args.budget} | evaluation.to_json()
            log.info(f"figures: {log.json('val.json', figures)}")


def speed(args: Namespace) -> None:
    device, _, val_set, model, path, log = trained(args)
    with log:
        log.info(f"timing {path}; {device}")
        timed = []
        for one in each_budget(args):
            if len(args.budgets) > 1:
                log.info(f"budget {budget_text(one.budget)}")
            timed.append(benchmark(model, val_set, one, device, log))
        figures = origin(path, device) | (timed[0] if len(timed) == 1 else {"budgets": timed})
        log.info(f"figures: {log.json('speed.json', figures)}")


def trained(
    args: Namespace,
) -> tuple[torch.device, Ranks, SegmentationDataset, nn.Module, Path | str, RunLog]:
    """What val and speed start from: device, ranks, validation set, model with its weights, the
    checkpoint they came from, and the log, which is made last and holds the command."""
    with user_errors():
        device, ranks = place(args)
        val_set = build_val_set(args)
        model = build(args, val_set)
        path = find_checkpoint(args)
        checkpoint = load_weights(model, path)
        told = settle_upsampling(model, args, checkpoint) + other_blocks(args, checkpoint)
        model = model.to(device)
        log = RunLog(folder_of(args), quiet=not ranks.main)
    log.command()
    for line in told:
        log.info(line)
    return device, ranks, val_set, model, path, log


def place(args: Namespace) -> tuple[torch.device, Ranks]:
    """This process's device, and its place among those that torchrun has started. Raises ValueError
    for a device that is not there."""
    ranks = ranks_of_environment()
    if ranks.count > 1 and args.mode == "speed":
        raise ValueError("--mode speed times one device: start it without torchrun")
    device = choose_device(args.device, ranks)
    return device, join(ranks, device)


def check_same_start(trainer: Trainer, ranks: Ranks) -> None:
    """Raise ValueError where ranks have found different checkpoints."""
    steps = ranks.everyones(trainer.progress.total_steps)
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes would go on from different checkpoints, after {steps} steps: --exp-dir "
            "must be a folder that all nodes share"
        )


def origin(path: Path | str, device: torch.device) -> dict[str, Any]:
    """How figures came about, for their JSON."""
    return {"command": command_line(), "checkpoint": str(path), "versions": versions(device)}


def build(args: Namespace, dataset: SegmentationDataset, pretrained: bool = False) -> nn.Module:
    """The network under its policy. Raises ValueError where the two do not fit together."""
    net = build_model(args.backbone, dataset.info.num_classes, pretrained, args.num_features)
    policy = segblocks.build_policy(
        args.segblocks_policy,
        block_size=args.segblocks_block_size,
        percent_target=args.segblocks_percent_target,
        quantize_percentage=args.segblocks_quantize_percentage,
        sparsity_weight=args.segblocks_sparsity_weight,
        budgets=args.segblocks_budgets,
        normalise_advantage=args.segblocks_normalise_advantage,
        entropy_weight=args.segblocks_entropy_weight,
        warmup_share=args.segblocks_warmup_share,
        recolour=args.segblocks_recolour,
        place_weight=args.segblocks_place_weight,
        budget_power=args.segblocks_budget_power,
    )
    legacy = bool(args.segblocks_legacy_upsample)  # if not given, the checkpoint settles it
    model = segblocks.SegBlocksModel(net, policy, legacy_upsample=legacy)
    if args.segblocks_policy != "disabled":
        try:
            check_block_size(net, args.segblocks_block_size)
        except (NotImplementedError, ValueError) as error:
            if args.segblocks_block_size % SMALLEST_BLOCK:
                raise ValueError(
                    f"--segblocks-block-size {args.segblocks_block_size}: features at a stride of "
                    f"{SMALLEST_BLOCK // 2} need a multiple of {SMALLEST_BLOCK}"
                ) from error
            raise NotImplementedError(
                f"--backbone {args.backbone} cannot run on blocks ({error}); choose another, or "
                "--segblocks-policy disabled"
            ) from error
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


@torch.no_grad()
def check_block_size(net: nn.Module, block_size: int) -> None:
    """Run one small image on mixed blocks: what the network cannot do on blocks shows here, before
    anything is written, and not in the middle of an epoch."""
    image = torch.zeros(1, 3, 2 * block_size, 2 * block_size)
    grid = torch.eye(2, dtype=torch.bool)[None]  # 1,2,2
    training = net.training
    segblocks.execute_with_grid(net.eval(), image, grid)
    net.train(training)


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """auto, cpu, cuda or cuda:INDEX -> a device that is there; of several ranks, each takes the
    CUDA device of its own number on the node. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"--device {name!r}: accepted are auto, cpu, cuda and cuda:INDEX")
    if index and ranks.count > 1:
        raise ValueError(f"--device {name}: with several processes give cuda; each takes its own")
    if kind == "cuda" and ranks.count > 1 and ranks.per_node > torch.cuda.device_count():
        raise ValueError(
            f"{ranks.per_node} processes on this node, but PyTorch sees "
            f"{torch.cuda.device_count()} CUDA devices here; start as many as there are devices "
            "(torchrun --nproc-per-node), or use --device cpu"
        )
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here; use "
            "--device cpu or auto"
        )
    if kind == "cuda":
        device = torch.device(kind, int(index or ranks.local))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


MODES = {"train": train, "val": validate, "speed": speed}


def main(argv: list[str] | None = None) -> int:
    """Run one mode; the exit status: 0, 1 for something the user can put right, 130 for Ctrl-C."""
    args = parse_args(argv)
    seed_everything(args.seed, args.deterministic)
    sys.setswitchinterval(SWITCH_SECONDS)
    rank = os.environ.get("RANK", "0")
    who = f" (process {rank})" if rank != "0" else ""
    try:
        MODES[args.mode](args)
    except (UserError, DataError, segblocks.BudgetError, torch.OutOfMemoryError) as error:
        if args.debug:
            raise
        memory = isinstance(error, torch.OutOfMemoryError)
        print(f"error{who}: {OUT_OF_MEMORY if memory else one_line(error)}", file=sys.stderr)
        return 1
    except Stopped as stop:
        leave()
        how = "the same command" if is_auto(args) else "--resume auto"
        print(f"{stop}: {how} goes on from there", file=sys.stderr)
        return stop.exit_status
    except KeyboardInterrupt:
        print("interrupted: training goes on from its last checkpoint", file=sys.stderr)
        return 130
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
