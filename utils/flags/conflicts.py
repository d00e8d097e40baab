"""Flags that do not go together."""

import argparse
import os

from dataloaders import file_datasets


def conflict(args: argparse.Namespace) -> str | None:
    """What is wrong with how the flags go together, or None."""
    name, policy = args.name, args.segblocks_policy
    if not name or os.path.isabs(name) or ".." in name.split("/"):
        return f"--name {name!r} must be a relative path inside --exp-dir, without '..'"
    if args.mode != "train" and args.resume == "none":
        return f"--mode {args.mode} needs a checkpoint: leave out --resume none"
    if len(args.crop_res) > 2:
        return f"--crop-res takes one or two numbers, not {len(args.crop_res)}"
    if args.scale_min > args.scale_max:
        return f"--scale-min {args.scale_min} is larger than --scale-max {args.scale_max}"
    if args.budgets and args.mode == "train":
        return (
            "--budget is for --mode val and speed; in training use --segblocks-percent-target or "
            "--segblocks-budgets"
        )
    if args.teacher and args.mode != "train":
        return f"--teacher is for --mode train: {args.mode} runs what has been learned"
    if args.teacher_weight is not None and not args.teacher:
        return "--teacher-weight needs --teacher FILE"
    if args.profiler and args.mode == "val":
        return "--profiler is for --mode train and speed"
    if args.policy_metrics and args.mode == "speed":
        return "--policy-metrics is for --mode train and val: speed mode does not validate"
    if len({type(b) for b in args.budgets if b == 1 or isinstance(b, float)}) > 1:
        return "--budget 1 beside shares: 1 is one block; give 1.0 or 100% for all of them"
    if args.budgets and policy == "disabled":
        return "--budget needs blocks: choose a --segblocks-policy other than disabled"
    problem = _policy_conflict(args)
    if problem:
        return problem
    if args.mode == "speed" and policy == "oracle":
        return "--mode speed cannot time --segblocks-policy oracle: it looks at the labels"
    return missing_folder(args)


def _policy_conflict(args: argparse.Namespace) -> str | None:
    """The same, of how the policy learns."""
    policy, budgets = args.segblocks_policy, args.segblocks_budgets
    if budgets and budgets[0] > budgets[1]:
        return f"--segblocks-budgets {budgets[0]} {budgets[1]}: the first is larger than the second"
    if args.segblocks_budget_power != 1 and not budgets:
        return "--segblocks-budget-power needs --segblocks-budgets LOW HIGH"
    if budgets and policy == "disabled":
        return "--segblocks-budgets needs blocks: choose a --segblocks-policy other than disabled"
    learns = {
        "--segblocks-reward balanced": args.segblocks_reward != "loss",
        "--segblocks-normalise-advantage yes": args.segblocks_normalise_advantage,
        "--segblocks-entropy-weight": args.segblocks_entropy_weight,
        "--segblocks-recolour yes": args.segblocks_recolour,
        "--segblocks-place-weight": args.segblocks_place_weight,
        "--segblocks-policy-epochs": args.segblocks_policy_epochs,
        "--segblocks-refine-epochs": args.segblocks_refine_epochs,
        "--segblocks-warmup-epochs": args.segblocks_warmup_epochs,
        "--segblocks-calibrate": args.segblocks_calibrate != "no",
    }
    given = next((flag for flag, value in learns.items() if value), None)
    if given and policy != "reinforce":
        return f"{given} is for a policy that learns: give --segblocks-policy reinforce"
    if args.segblocks_warmup_share is not None and not args.segblocks_warmup_epochs:
        return "--segblocks-warmup-share needs --segblocks-warmup-epochs above 0"
    if args.mode == "train" and args.segblocks_calibrate == "no":
        if args.segblocks_place_weight:
            return "--segblocks-place-weight adds what --segblocks-calibrate train or val has found"
        if args.segblocks_refine_epochs:
            return "--segblocks-refine-epochs needs a share: --segblocks-calibrate train or val"
    before = args.epochs - args.segblocks_refine_epochs
    if args.segblocks_refine_epochs and before < max(1, args.segblocks_policy_epochs):
        return (
            f"--segblocks-refine-epochs {args.segblocks_refine_epochs} leaves too few of the "
            f"{args.epochs} epochs for the policy to learn in before (--segblocks-policy-epochs)"
        )
    if args.segblocks_calibrate != "no" and args.mode == "speed":
        return "--segblocks-calibrate is for train and val; speed uses the checkpoint's threshold"
    if args.segblocks_calibrate != "no" and args.mode == "val" and args.budgets:
        return "--segblocks-calibrate fits a threshold and --budget does without one: give either"
    return None


def missing_folder(args: argparse.Namespace) -> str | None:
    """That the data set's folder was not given, or None."""
    kind = file_datasets().get(args.dataset)
    if kind is None or kind.options(args, "train")["data_dir"]:
        return None
    return f"--dataset {args.dataset} needs its folder: give {kind.flag} DIR or set {kind.variable}"
