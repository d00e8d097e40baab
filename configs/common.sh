# Sourced by every experiment script: finds the program and a Python to run it.
# PYTHON=... chooses the interpreter; without it .venv of scripts/setup.sh, else python3.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$ROOT/.venv/bin/python"
    if [[ ! -x "$PYTHON" ]]; then
        PYTHON=python3
        "$PYTHON" -c 'import importlib.util as u; exit(not u.find_spec("torch"))' 2>/dev/null || {
            echo "$(basename "$0"): $PYTHON has no PyTorch: run scripts/setup.sh, which makes .venv," \
                "or set PYTHON" >&2
            exit 1
        }
    fi
fi

# Experiments land in the repository's exp/ from wherever the script is called; other paths on the
# command line are relative to where it is called.
run() {
    exec "$PYTHON" "$ROOT/train.py" --exp-dir "$ROOT/exp" "$@"
}
