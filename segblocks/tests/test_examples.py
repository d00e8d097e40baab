"""The examples run as they are, on any machine, and so does the code of the README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="the examples use torchvision")

PROJECT = Path(__file__).parents[1]
EXAMPLES = sorted((PROJECT / "examples").glob("*.py"))
README = (PROJECT / "README.md").read_text()


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    """Without arguments, from any folder; the first lines of its docstring say how."""
    output = run(tmp_path, str(path))
    assert "high" in output
    assert f"python examples/{path.name}" in path.read_text().split('"""')[1]


def test_picture_split_takes_a_picture(tmp_path):
    from PIL import Image

    Image.new("RGB", (150, 90), (200, 30, 30)).save(tmp_path / "in.png")
    script = str(PROJECT / "examples" / "picture_split.py")
    run(
        tmp_path, script, "--image", "in.png", "--out", "out.png", "--share", "0.5", "--block", "32"
    )
    assert Image.open(tmp_path / "out.png").size == (150, 180)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_code_of_the_readme():
    """The Python blocks, one after the other, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_paths_in_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (PROJECT / target).exists(), target
