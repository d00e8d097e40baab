"""What importing and packaging promise."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import segblocks

PROJECT = Path(__file__).parents[1]


def test_import_is_silent_and_needs_no_cupy():
    code = (
        "import sys, torch, warnings\n"
        "warnings.simplefilter('error')\n"
        "import segblocks, segblocks.ops, segblocks.policy\n"
        "assert 'cupy' not in sys.modules, 'CuPy was imported'\n"
        "assert 'torchvision' not in sys.modules, 'torchvision was imported'\n"
        "assert not any(m in sys.modules for m in ('models', 'utils', 'train', 'dataloaders'))\n"
        "assert not torch.cuda.is_initialized(), 'CUDA was initialised'\n"
    )
    # What PyTorch itself prints on some machines is not ours.
    done, plain = (
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            cwd=PROJECT,
            timeout=120,
        )
        for program in (code, "import torch")
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (plain.stdout, plain.stderr)


def test_everything_public_is_documented():
    for name in segblocks.__all__:
        assert getattr(segblocks, name).__doc__, name


def test_wheel_contains_the_package_and_its_kernels(tmp_path):
    try:  # by metadata: once it is asked for pip, setuptools cannot be imported any more here
        importlib.metadata.version("pip")
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("setuptools and pip are needed to build a wheel")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"setuptools {version} is older than the 77 that the build asks for")
    # A copy, because setuptools leaves build folders beside the project.
    source = tmp_path / "source"
    copied = ["pyproject.toml", "README.md", *(p.name for p in PROJECT.glob("LICENSE*"))]
    source.mkdir()
    for name in copied:
        (source / name).write_bytes((PROJECT / name).read_bytes())
    files = [
        path
        for pattern in ("**/*.py", "**/*.cu", "**/*.cuh")
        for path in (PROJECT / "segblocks").glob(pattern)
    ]
    for path in files:
        target = source / path.relative_to(PROJECT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [sys.executable, *command, "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("segblocks-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(PROJECT)) for path in files}
    assert wanted <= packed, sorted(wanted - packed)
    assert any(name.endswith(".cu") for name in packed)
    assert not any(name.startswith(("tests", "examples")) for name in packed)
