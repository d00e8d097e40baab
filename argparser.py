"""The command line of train.py: published flag names and defaults, grouped, every flag checked."""

import argparse
import os
from fractions import Fraction
from typing import NoReturn

from dataloaders import DATASETS, file_datasets
from utils.flags.conflicts import conflict
from utils.flags.types import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    WHOLE,
    boolean,
    budget,
    epochs_or_share,
    number,
)
from utils.losses import LOSSES
from utils.training.teacher import WEIGHT

POLICIES = ("disabled", "reinforce", "random", "middle", "heuristic", "oracle")


class Parser(argparse.ArgumentParser):
    """Without the usage of all flags in front of every error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists all flags\n")


class _Latest(argparse.Action):
    """--resume and --resume-best: the one further right counts, as for a flag given twice."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if values:  # --resume-best no takes nothing back
            namespace.resume, namespace.resume_best = "", False
        setattr(namespace, self.dest, values)


def build_parser() -> argparse.ArgumentParser:
    """The parser alone; `parse_args` also checks how flags go together."""
    parser = Parser(
        prog="train.py",
        description="Train, validate or time a segmentation network that spends full resolution "
        "only on the blocks of an image that need it.",
        epilog="Ready experiments: configs/<dataset>/<model>/*.sh. Booleans: yes or no.",
    )
    _general(parser.add_argument_group("general"))
    data_flags(parser.add_argument_group("data"))
    _training(parser.add_argument_group("training"))
    _network(parser.add_argument_group("network"))
    _blocks(parser.add_argument_group("blocks"))
    _evaluation(parser.add_argument_group("validation and timing"))
    return parser


# A table to read: a flag takes two or three lines.
# fmt: off
def _general(group) -> None:
    add = group.add_argument
    add("--mode", choices=("train", "val", "speed"), default="train",
        help="train, validate a checkpoint, or time it (default: %(default)s)")
    add("--name", default="default", metavar="NAME",
        help="experiment: files go to EXP_DIR/NAME (default: %(default)s)")
    add("--exp-dir", default="exp", metavar="DIR",
        help="folder that holds all experiments (default: %(default)s)")
    add("--resume", default="", action=_Latest, metavar="WHAT",
        help="auto (the default): the experiment's checkpoint.pth, which val and speed require and "
        "train continues from if it is there; none: start afresh (train only); or a file or an "
        "http(s) address, published checkpoints included, where #sha256=... is checked; of "
        "--resume and --resume-best the later counts")
    add("--resume-best", type=boolean, default=False, action=_Latest, metavar="YES/NO",
        help="use the experiment's checkpoint_best.pth (default: no)")
    add("--device", default="auto", metavar="DEVICE",
        help="auto, cpu, cuda or cuda:INDEX; auto takes CUDA where there is one")
    add("--seed", type=WHOLE, default=0, metavar="N",
        help="seed of everything random (default: 0)")
    add("--deterministic", type=boolean, default=False, metavar="YES/NO",
        help="repeat bit for bit on CUDA too, somewhat slower; the CPU always does (default: no)")
    add("--profiler", type=boolean, default=False, metavar="YES/NO",
        help="profile a few steps of training or timing: a table in run.log, a trace in "
        "profile.json (default: no)")
    add("--debug", type=boolean, default=False, metavar="YES/NO",
        help="show where in the code a wrong input was noticed (default: no)")


def data_flags(group) -> None:
    """Which data set, and where it is; for `dataloaders.check` too."""
    add = group.add_argument
    add("--dataset", default="cityscapes", metavar="NAME",
        help=f"{', '.join(DATASETS)}; synthetic is drawn on the fly (default: %(default)s)")
    for name, kind in file_datasets().items():
        add(kind.flag, default=os.environ.get(kind.variable, ""), metavar="DIR",
            help=f"folder of the {name} data (default: ${kind.variable})")
    add("--synthetic-size", type=COUNT, nargs=2, default=(512, 1024), metavar=("H", "W"),
        help="height and width of synthetic scenes in pixels (default: 512 1024)")
    add("--synthetic-train-images", type=COUNT, default=1000, metavar="N",
        help="number of synthetic training scenes (default: %(default)s)")
    add("--synthetic-val-images", type=COUNT, default=100, metavar="N",
        help="number of synthetic validation scenes (default: %(default)s)")
    add("--num-workers", type=WHOLE, default=7, metavar="N",
        help="processes that load data for each training process, never more than there are cores; "
        "the result does not depend on it (default: %(default)s)")
    add("--cache-images", choices=("auto", "yes", "no"), default="auto",
        help="keep decoded images in memory after their first use; auto: where all of them take at "
        "most half of what is free (default: %(default)s)")


def _training(group) -> None:
    add = group.add_argument
    add("--res", type=COUNT, default=2048, metavar="PIXELS",
        help="training images are first resized to this width, aspect ratio kept; see --val-res "
        "for validation (default: %(default)s)")
    add("--crop-res", type=COUNT, nargs="+", default=[1024], metavar="PIXELS",
        help="side of the square training crop, or its height and width (default: 1024)")
    add("--scale-min", type=POSITIVE, default=0.5, metavar="S",
        help="smallest crop box in units of CROP_RES: zooms in by 1/S (default: %(default)s)")
    add("--scale-max", type=POSITIVE, default=2.0, metavar="S",
        help="largest crop box in units of CROP_RES: zooms out by S (default: %(default)s)")
    add("--jitter", type=SHARE, default=0.3, metavar="SHARE",
        help="brightness, contrast and saturation jitter, 0 to 1 (default: %(default)s)")
    add("--rotate", type=number(float, 0, 180), default=0.0, metavar="DEGREES",
        help="largest random rotation (default: 0)")
    add("--epochs", type=COUNT, default=350, metavar="N",
        help="epochs (default: %(default)s)")
    add("--max-steps", type=WHOLE, default=0, metavar="N",
        help="stop after N optimiser steps in all, then validate; the schedule stays that of "
        "EPOCHS (default: 0, no limit)")
    add("--batch-size", type=COUNT, default=None, metavar="N",
        help="images per training batch, shared by all processes of a run, or per timed forward "
        "pass; validation runs one image at a time (default: 8, in speed mode 1)")
    add("--accumulate", type=COUNT, default=1, metavar="N",
        help="batches whose gradients make one optimiser step (default: 1)")
    add("--lr", type=POSITIVE, default=4e-4, metavar="LR",
        help="learning rate of the decoder (default: %(default)s)")
    add("--lr-finetune-factor", type=NOT_NEGATIVE, default=0.25, metavar="F",
        help="learning rate and weight decay of a pretrained backbone, relative to the decoder's "
        "(default: %(default)s)")
    add("--lr-end", type=NOT_NEGATIVE, default=1e-6, metavar="LR",
        help="learning rate at the end of the cosine schedule (default: %(default)s)")
    add("--weight-decay", type=NOT_NEGATIVE, default=1e-4, metavar="WD",
        help="weight decay of the decoder (default: %(default)s)")
    add("--grad-clip", type=NOT_NEGATIVE, default=0.0, metavar="NORM",
        help="largest gradient norm over all parameters (default: 0, no clipping)")
    add("--loss", choices=tuple(LOSSES), default="crossentropy",
        help="task loss; bootstrap_ce and ohem train on the hardest pixels (default: %(default)s)")
    add("--ohem-threshold", type=number(float, 0, 1, above=True), default=0.7, metavar="P",
        help="ohem keeps pixels whose true class has a probability below P (default: %(default)s)")
    add("--ohem-min-kept", type=COUNT, default=100_000, metavar="PIXELS",
        help="ohem keeps at least this many pixels per image of a batch (default: %(default)s)")
    add("--class-weights", nargs="+", default=None, metavar="W|FILE",
        help="weight of each class in the loss: one number a class, or the JSON file that python "
        "-m dataloaders.check --json writes (default: all equal)")
    add("--teacher", default="", metavar="FILE",
        help="learn from what this checkpoint's network says at full resolution, too: a dense "
        "training of the same data set, of any --backbone; a file or an address as for --resume "
        "(default: labels alone)")
    add("--teacher-weight", type=SHARE, default=None, metavar="W",
        help=f"weight of the teacher in the task loss; labels have the rest (default: {WEIGHT})")
    add("--amp", choices=("off", "bf16", "fp16"), default="off",
        help="mixed precision in training; fp16 scales the loss (default: %(default)s)")
    add("--cuda-graphs", type=boolean, default=True, metavar="YES/NO",
        help="on CUDA: replay training steps and passes of validation from CUDA graphs, which "
        "saves the host's time and changes results by rounding at most (default: yes)")
    add("--ema", type=number(float, 0, below=1), default=0.0, metavar="DECAY",
        help="keep an exponential moving average of the weights with this decay a step, such as "
        "0.999, validated and saved beside them (default: 0, none)")
    add("--log-every", type=COUNT, default=100, metavar="STEPS",
        help="optimiser steps between two log lines (default: %(default)s)")
    add("--val-every", type=WHOLE, default=1, metavar="EPOCHS",
        help="epochs between validations; the last epoch is always validated, 0: only the last "
        "(default: %(default)s)")
    add("--save-minutes", type=NOT_NEGATIVE, default=10.0, metavar="MIN",
        help="minutes between checkpoints within an epoch; every epoch ends with one (default: "
        "%(default)s; 0: none within)")


def _network(group) -> None:
    add = group.add_argument
    add("--backbone", default="resnet18", metavar="NAME",
        help="backbone of SwiftNet: resnet18, resnet34, resnet50, efficientnet_lite0, "
        "efficientnet_lite1, or timm:NAME for a network of the package timm with features at "
        "strides 4, 8, 16 and 32 (default: %(default)s)")
    add("--pretrain-backbone", type=boolean, default=True, metavar="YES/NO",
        help="start training from ImageNet weights (default: yes); val and speed never load them")
    add("--num-features", type=COUNT, default=None, metavar="N",
        help="channels of the decoder (default: 48 for EfficientNet-Lite, else 128)")
    add("--channels-last", type=boolean, default=True, metavar="YES/NO",
        help="keep activations channels-last in memory: same result, faster (default: yes)")


def _blocks(group) -> None:
    add = group.add_argument
    add("--segblocks-policy", choices=POLICIES, default="disabled",
        help="what decides which blocks run at full resolution (default: %(default)s, dense)")
    add("--segblocks-block-size", type=COUNT, default=128, metavar="PIXELS",
        help="side of a block, a multiple of 64 (default: %(default)s)")
    add("--segblocks-percent-target", type=SHARE, default=0.5, metavar="SHARE",
        help="share of full-resolution blocks to aim for, 0 to 1; for heuristic and oracle what a "
        "block's score has to exceed: a share of theirs is --budget (default: %(default)s)")
    add("--segblocks-quantize-percentage", type=SHARE, default=1 / 16, metavar="SHARE",
        help="round the number of full-resolution blocks up to a multiple of this share (default: "
        "1/16; 0: no rounding)")
    add("--segblocks-sparsity-weight", type=NOT_NEGATIVE, default=1.0, metavar="W",
        help="weight of the share in the policy's reward (default: 1)")
    add("--segblocks-policy-lr-factor", type=NOT_NEGATIVE, default=1.0, metavar="F",
        help="learning rate of the policy relative to LR (default: 1)")
    add("--segblocks-policy-wd-factor", type=NOT_NEGATIVE, default=1.0, metavar="F",
        help="weight decay of the policy relative to WEIGHT_DECAY (default: 1)")
    add("--segblocks-policy-epochs", type=epochs_or_share, default=0, metavar="EPOCHS|SHARE",
        help="epochs in which the policy learns, or which share of --epochs (1/7), by a cosine of "
        "its own; then its weights stay as they are, before it knows the training images by heart "
        "(default: 0, in all of them)")
    add("--segblocks-refine-epochs", type=epochs_or_share, default=0, metavar="EPOCHS|SHARE",
        help="last epochs, or share of --epochs, in which the policy learns again, to rank blocks "
        "by how much of its reward full resolution saves them, measured by two more passes of the "
        "by then trained network, and by what it said of them before (default: 0)")
    add("--segblocks-budgets", type=SHARE, nargs=2, default=None, metavar=("LOW", "HIGH"),
        help="training: a budget for every batch, one of six shares from LOW to HIGH; the policy "
        "then learns to rank blocks for any budget (default: the policy decides how many)")
    add("--segblocks-budget-power", type=POSITIVE, default=1.0, metavar="P",
        help="above 1, budgets near LOW are drawn more often: LOW + (HIGH - LOW) u^P, u uniform "
        "and u^P rounded to fifths (default: 1)")
    add("--segblocks-reward", choices=("loss", "balanced"), default="loss",
        help="what full resolution earns a block in training: the loss of its pixels, as "
        "published, or that over the size of their classes, which then count alike, as in mean "
        "IoU (default: %(default)s)")
    add("--segblocks-normalise-advantage", type=boolean, default=False, metavar="YES/NO",
        help="divide the reward's task part by its spread, so that it does not fade as the loss "
        "falls (default: no)")
    add("--segblocks-entropy-weight", type=NOT_NEGATIVE, default=0.0, metavar="W",
        help="weight, in the policy's reward, of its entropy relative to the wanted share, against "
        "early collapse (default: 0)")
    add("--segblocks-warmup-epochs", type=NOT_NEGATIVE, default=0.0, metavar="EPOCHS",
        help="epochs over which training goes from random grids to the policy's own (default: 0)")
    add("--segblocks-warmup-share", type=SHARE, default=None, metavar="SHARE",
        help="share of full-resolution blocks with which the warm-up begins (default: the target)")
    add("--segblocks-recolour", type=boolean, default=False, metavar="YES/NO",
        help="let the policy see each training image in other colours, which it would know the few "
        "that it learns from by (default: no)")
    add("--segblocks-place-weight", type=NOT_NEGATIVE, default=0.0, metavar="W",
        help="with --segblocks-calibrate: evaluation adds to the policy's scores so many times "
        "their mean at each place in the picture, over the images that calibration looks at; what "
        "a policy says of an image that it does not know is drawn towards what it says of such a "
        "place (default: 0)")
    add("--segblocks-calibrate", choices=("no", "train", "val"), default=None,
        help="train, val: fit the policy's threshold on images of this split, without their "
        "labels, so that evaluation realises the target share, and what --segblocks-place-weight "
        "adds; training keeps both in the checkpoint (default: train in training with "
        "--segblocks-budgets or --segblocks-refine-epochs, else no: threshold 0 or the "
        "checkpoint's)")
    add("--segblocks-legacy-upsample", type=boolean, default=None, metavar="YES/NO",
        help="resize each block on its own, as the published weights were trained (default: as the "
        "checkpoint was trained, else no)")


def _evaluation(group) -> None:
    add = group.add_argument
    add("--fp16", type=boolean, default=True, metavar="YES/NO",
        help="validate and time on CUDA in half precision, on a copy of the weights; the CPU "
        "always uses float32 (default: yes)")
    add("--budget", type=budget, nargs="+", default=None, metavar="SHARE|N",
        help="val, speed: run exactly this share (0.4, 40%%, 1.0 for all) or number (51, 1 for a "
        "single one) of blocks at full resolution, whatever the policy was trained for; with "
        "several, one after the other, val makes a curve of them: curve.json, curve.png")
    add("--policy-metrics", type=boolean, default=False, metavar="YES/NO",
        help="in validation too: share of full resolution by class, how the policy's scores rank "
        "blocks beside the oracle's, mIoU near label boundaries; some three times the work "
        "(default: no)")
    add("--val-res", type=WHOLE, default=0, metavar="PIXELS",
        help="width to which validation and timing resize images, aspect ratio kept; scores are at "
        "the labels' own size all the same (default: 0, native size)")
    add("--viz", nargs="+", choices=("policy", "pred"), default=[],
        help="write pictures to EXP_DIR/NAME/viz: where the policy looks, what the network sees")
    add("--num-viz-images", type=WHOLE, default=5, metavar="N",
        help="validation images shown, in TensorBoard too (default: %(default)s)")
    add("--speed-images", type=COUNT, default=8, metavar="N",
        help="validation batches to time in turn (default: %(default)s)")
    add("--speed-repeats", type=COUNT, default=50, metavar="N",
        help="timed forward passes of each network (default: %(default)s)")
    add("--speed-autotune", type=boolean, default=False, metavar="YES/NO",
        help="let Inductor search its kernels for the dense baseline: minutes (default: no)")


# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; a wrong one ends with one line and exit status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.batch_size is None:
        args.batch_size = 1 if args.mode == "speed" else 8
    args.synthetic_size = tuple(args.synthetic_size)
    # One budget is a setting of the run, several are so many runs.
    args.budgets = args.budget or []
    args.budget = args.budgets[0] if len(args.budgets) == 1 else None
    learns, refines = args.segblocks_policy_epochs, args.segblocks_refine_epochs
    if isinstance(learns, Fraction):  # 0 would be all of them
        args.segblocks_policy_epochs = max(int(learns * args.epochs), int(learns > 0))
    if isinstance(refines, Fraction):
        args.segblocks_refine_epochs = int(refines * args.epochs)
    if args.segblocks_calibrate is None:
        fitted = args.mode == "train" and _ranks_only(args)
        args.segblocks_calibrate = "train" if fitted else "no"
    problem = conflict(args)
    if problem:
        parser.error(problem)
    if args.teacher and args.teacher_weight is None:
        args.teacher_weight = WEIGHT
    return args


def _ranks_only(args: argparse.Namespace) -> bool:
    """A learned policy whose training never asks for a threshold, or not at the end."""
    imposed = args.segblocks_budgets is not None or args.segblocks_refine_epochs > 0
    return imposed and args.segblocks_policy == "reinforce"
