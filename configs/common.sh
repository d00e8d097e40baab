# Sourced by every experiment script: finds the program and a Python to run it.
# PYTHON=... chooses the interpreter; without it .venv of scripts/setup.sh, else python3.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$ROOT/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi

# Experiments land in the repository's exp/ from wherever the script is called; other paths on the
# command line are relative to where it is called.
run() {
    exec "$PYTHON" "$ROOT/train.py" --exp-dir "$ROOT/exp" "$@"
}
