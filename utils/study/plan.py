"""What a study trains and how it validates it; hyperparameters come from the configs/ scripts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MODEL = "swiftnet_rn18"
CURVE = "--budget 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1.0"
TARGET = "0.4"
TEACHER = "dense"  # the experiment whose network of the same seed teaches those that say so
TAUGHT = "--teacher TEACHER"
ANY = "--segblocks-budgets 0.2 1.0 --segblocks-budget-power 24"


@dataclass(frozen=True)
class Setup:
    """A data set: its block size, its epochs, and flags beyond those of its scripts in configs/."""

    block_size: int
    epochs: int
    data_flags: str = ""
    train_flags: str = ""
    # Of policies that learn, in the experiments at 20, 40 and 60 %.
    targets: tuple[str, str, str] = ("0.2", TARGET, "0.6")
    recipe: str = "calibrated"  # of policies that learn, unless another is asked for


SETUPS = {
    # 10 blocks of 48 are 20.8 %. Of small images the policy's own operations are 1.4 % of the dense
    # network's: at 38.1 % they and those of the blocks are 55 % of it.
    "camvid": Setup(64, 300, targets=("0.208", "0.381", "0.6"), recipe="brief"),
    "cityscapes": Setup(128, 60),
    "synthetic": Setup(
        128,
        12,
        "--synthetic-size 1024 2048 --synthetic-val-images 60",
        "--synthetic-train-images 320 --res 2048 --crop-res 512 1024 --scale-min 0.5 "
        "--scale-max 1.0 --batch-size 4 --lr 4e-4",
    ),
}

# How the learned policy is trained: as published, with a threshold that is fitted, that with one
# idea more each, with those together that make probabilities soft, and these with one more after
# the other: scores drawn towards the mean of their place, other colours, a fifth of the blocks in
# training whatever the share in use, a policy that learns again at the end. Then that with a fifth
# of the blocks as the least; the same with policies that learn for a twentieth of the epochs at a
# time; and `refined` with a dense teacher.
_FITTED = "--segblocks-calibrate val"
_NORMALISED = f"{_FITTED} --segblocks-normalise-advantage yes --segblocks-entropy-weight 0.5"
_BALANCED = "--segblocks-reward balanced --segblocks-policy-wd-factor 30"
_SOFT = f"{_NORMALISED} {_BALANCED} --segblocks-policy-epochs {{seventh}}"
_PLACE = f"{_SOFT} --segblocks-place-weight 2"
_RECOLOUR = f"{_PLACE} --segblocks-recolour yes"
_FIFTH = f"{_RECOLOUR} --segblocks-budgets 0.2 0.2"
_REFINE = "--segblocks-refine-epochs {seventh}"
_REFINED = f"{_FIFTH} {_REFINE}"
_VARIED = f"{_RECOLOUR} {_REFINE} {ANY}"
RECIPES = {
    "published": "",
    "calibrated": _FITTED,
    "normalised": _NORMALISED,
    "warmup": f"{_FITTED} --segblocks-warmup-epochs {{tenth}} --segblocks-warmup-share 1",
    "exact": f"{_FITTED} --segblocks-budgets {{target}} {{target}}",
    "short": f"{_FITTED} --segblocks-policy-epochs {{quarter}}",
    "balanced": f"{_FITTED} {_BALANCED}",
    "soft": _SOFT,
    "place": _PLACE,
    "recolour": _RECOLOUR,
    "fifth": _FIFTH,
    "refined": _REFINED,
    "varied": _VARIED,
    "brief": _VARIED.replace("seventh", "twentieth"),
    "taught": f"{_REFINED} {TAUGHT}",
}


@dataclass(frozen=True)
class Experiment:
    """One row of the table: flags of training, and of validations by name.

    `seeded` experiments run with every seed, the others with the first. `groups` say which parts
    of the study it belongs to.
    """

    name: str
    title: str
    train: str
    validations: dict[str, str] = field(default_factory=dict)
    seeded: bool = False
    groups: tuple[str, ...] = ("headline",)

    @property
    def teacher(self) -> str | None:
        """Name of the experiment that has to be trained before."""
        return TEACHER if TAUGHT in self.train else None


def experiments(dataset: str, recipe: str, epochs: int | None = None) -> list[Experiment]:
    """Every experiment of the study of one data set, `recipe` being that of its learned policies.

    Raises ValueError for an unknown data set or recipe.
    """
    for kind, name, known in (("data set", dataset, SETUPS), ("recipe", recipe, RECIPES)):
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(known)}")
    setup = SETUPS[dataset]
    epochs = epochs or setup.epochs
    blocks = f"--segblocks-block-size {setup.block_size}"
    spent, at_40 = f"--budget {TARGET}", setup.targets[1]

    def learned(recipe: str, target: str) -> str:
        parts = {
            "tenth": f"{epochs / 10:g}",
            "seventh": max(1, epochs // 7),
            "twentieth": max(1, epochs // 20),
            "quarter": max(1, epochs // 4),
        }
        flags = RECIPES[recipe].format(**parts, target=target)
        return f"--segblocks-policy reinforce --segblocks-percent-target {target} {blocks} {flags}"

    def placed(policy: str) -> str:
        return (
            f"--segblocks-policy {policy} --segblocks-percent-target {TARGET} {blocks} "
            f"--segblocks-budgets {TARGET} {TARGET}"
        )

    plan = [
        Experiment("dense", "dense", "", {"own": ""}, True),
        Experiment(
            "low",
            "every block at half resolution",
            f"--segblocks-policy random --segblocks-percent-target 0 {blocks}",
            {"own": ""},
            True,
        ),
        Experiment("random40", "random, 40 %", placed("random"), {"own": spent}, True),
        Experiment("middle40", "middle, 40 %", placed("middle"), {"own": spent}),
        Experiment("heuristic40", "heuristic, 40 %", placed("heuristic"), {"own": spent}),
        Experiment("oracle40", "oracle (sees the labels), 40 %", placed("oracle"), {"own": spent}),
        Experiment(
            "published40",
            "reinforce, published recipe, 40 %",
            learned("published", at_40),
            # The recipe "calibrated" is this training with a fitted threshold.
            {"own": "", "calibrated": "--segblocks-calibrate val"},
            True,
            ("headline", "recipe"),
        ),
    ]
    others = {
        policy: f"--segblocks-policy {policy} {spent}"
        for policy in ("random", "middle", "heuristic", "oracle")
    }
    serves_any = ANY in RECIPES[recipe]
    # Beside what the policy chooses by its threshold: so many blocks of each image, for example.
    measured = {
        "20": {"budget": "--budget 0.2"},
        "40": {"curve": CURVE} | (others if serves_any else {"random": others["random"]}),
        "60": {},
    }
    for share, target in zip(("20", "40", "60"), setup.targets):
        plan.append(
            Experiment(
                f"reinforce{share}",
                f"reinforce, recipe {recipe}, {share} %",
                learned(recipe, target),
                {"own": ""} | measured[share],
                share in ("20", "40"),
                ("headline", "recipe") if share == "40" else ("headline",),
            )
        )
    if not serves_any:  # else reinforce40 is that
        plan.append(
            Experiment(
                "any",
                "reinforce, any budget",
                f"{learned(recipe, at_40)} {ANY}",
                {"own": "", "curve": CURVE} | others,
                True,
            )
        )
    plan.append(
        Experiment(
            "random_any",
            "random, any budget",
            f"--segblocks-policy random {blocks} {ANY}",
            {"curve": CURVE},
        )
    )
    plan += [
        Experiment(
            f"recipe_{name}40",
            f"reinforce, recipe {name}, 40 %",
            learned(name, at_40),
            {"own": ""},
            groups=("recipe",),
        )
        for name in RECIPES
        if name not in ("published", "calibrated", recipe)
    ]
    if TAUGHT in RECIPES[recipe]:  # what a teacher does to others
        plan += [
            Experiment("dense_taught", "dense, with a teacher", TAUGHT, {"own": ""}, True),
            Experiment(
                "random40_taught",
                "random, 40 %, with a teacher",
                f"{placed('random')} {TAUGHT}",
                {"own": spent},
                True,
            ),
        ]
    return plan


def chosen(plan: Sequence[Experiment], only: Iterable[str]) -> list[Experiment]:
    """The experiments named in `only`, by name or group, and their teachers; all without any.

    Raises ValueError for a word that is neither.
    """
    only = list(only)
    groups = [group for e in plan for group in e.groups]
    names = list(dict.fromkeys([e.name for e in plan] + groups))
    for word in only:
        if word not in names:
            raise ValueError(f"no experiment or group {word!r}; choose from {', '.join(names)}")
    found = [e for e in plan if not only or e.name in only or set(e.groups) & set(only)]
    teachers = {e.teacher for e in found}
    return [e for e in plan if e in found or e.name in teachers]
