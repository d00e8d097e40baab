#!/usr/bin/env bash
# Format, lint, tests. Sets up what it needs; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
if [[ -n "${SEGBLOCKS_SKIP_SETUP:-}" ]]; then
    export PYTHON="${PYTHON:-python3}" PYTHONPATH="$PWD/segblocks:$PWD"
else
    export PYTHON="$PWD/.venv/bin/python"
fi

echo "test: ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .

# As many processes as cores (up to 8), one thread each. Tests on a GPU share its memory: no more than
# one for each 16 GiB of it.
most=$("$PYTHON" -c '
import torch
memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
print(min(8, memory >> 34 or 1) if memory else "none")')
if [[ $most == none ]]; then
    echo "test: no CUDA device here, tests marked gpu are skipped"
    most=8
fi
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n auto --maxprocesses "$most" --dist worksteal "$@"
