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

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # One process: tests of one GPU would compete for its memory.
    "$PYTHON" -m pytest "$@"
else
    echo "test: no CUDA device here, tests marked gpu are skipped"
    # As many processes as cores (up to 8), one thread each.
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
fi
