#!/usr/bin/env bash
# Make .venv with everything the project needs. Quick when that has been done already.
#
#   scripts/setup.sh                       python3 of at least 3.11 makes the environment
#   PYTHON=python3.12 scripts/setup.sh     another interpreter makes it
#   SEGBLOCKS_SKIP_SETUP=1 …               install nothing, use $PYTHON (or python3) as it is
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BASE="${PYTHON:-python3}"

fail() {
    echo "setup: $*" >&2
    exit 1
}

if [[ -n "${SEGBLOCKS_SKIP_SETUP:-}" ]]; then
    "$BASE" -c 'import torch, torchvision, torchmetrics, tensorboard, tqdm' ||
        fail "SEGBLOCKS_SKIP_SETUP is set, but $BASE lacks packages of requirements.txt"
    exit 0
fi
command -v "$BASE" >/dev/null || fail "no $BASE here: install Python 3.11 or newer, or set PYTHON"
"$BASE" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$BASE is $("$BASE" -V 2>&1); Python 3.11 or newer is needed: set PYTHON to one"

GPU=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then GPU=yes; fi

# What the environment was made from; when nothing of it has changed there is nothing to do.
STAMP=.venv/segblocks-setup
NOW="$(cat requirements.txt requirements-study.txt requirements-dev.txt segblocks/pyproject.toml scripts/setup.sh |
    cksum) gpu=$GPU"
if [[ -x .venv/bin/python && -f $STAMP && "$(cat $STAMP)" == "$NOW" ]]; then
    echo "setup: .venv is up to date"
    exit 0
fi

if [[ ! -x .venv/bin/python ]]; then
    echo "setup: making .venv with $("$BASE" -V)"
    "$BASE" -m venv .venv ||
        fail "cannot make a virtual environment: install the venv module (Debian: python3-venv)"
fi
PIP=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input)
echo "setup: installing PyTorch and the rest of requirements.txt (some GB, a few minutes)"
"${PIP[@]}" -r requirements-dev.txt
if [[ $GPU == yes ]]; then
    CUDA="$(.venv/bin/python -c 'import torch; print((torch.version.cuda or "").split(".")[0])')"
    case "$CUDA" in
        12 | 13)
            echo "setup: installing CuPy for CUDA $CUDA"
            "${PIP[@]}" "cupy-cuda${CUDA}x"
            ;;
        *) fail "there is a GPU, but this PyTorch is built for CUDA '${CUDA:-none}', not 12 or 13" ;;
    esac
fi
echo "setup: installing segblocks"
"${PIP[@]}" --editable ./segblocks
echo "$NOW" >$STAMP
echo "setup: done"
