"""The experiment scripts, and what they give to train.py."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import train

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("configs/*/*/*.sh"))
EXPERIMENTS = sorted({script.parent / script.stem.rpartition("_")[0] for script in SCRIPTS})
MODES = ("train", "val", "speed")


def label(path: Path) -> str:
    """A script or experiment as pytest shows it."""
    return path.relative_to(ROOT / "configs").as_posix()


def called(script: Path, *flags: str, python: str = sys.executable, folder: Path = ROOT):
    """Run a script from `folder` in a process of its own."""
    environment = {
        **os.environ,
        "PYTHON": python,
        "PYTHONPATH": f"{ROOT / 'segblocks'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [script, *flags], env=environment, cwd=folder, capture_output=True, text=True
    )


@functools.cache
def command_line(script: Path) -> tuple[str, ...]:
    """The arguments that a script gives to train.py."""
    program, *words = called(script, python="echo").stdout.split()
    assert program == str(ROOT / "train.py")
    return tuple(words)


def run_script(script: Path, *flags: str) -> int:
    """What the script does, in this process and from the current folder; -> the exit status."""
    return train.main([*command_line(script), *flags])
