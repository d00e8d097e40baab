#!/usr/bin/env bash
# The kernels under compute-sanitizer (of the CUDA toolkit; PATH has to lead to it): no access out of
# bounds, no race, no read of memory that nobody wrote. Needs a GPU. Takes some seconds a test, so of
# each test only some parametrisations run; arguments go to pytest (--sample 20 for more).
#
#   scripts/sanitize.sh                   all tools, a file of tests in each of four processes
#   TOOLS=racecheck JOBS=1 scripts/sanitize.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
FILES=(cuda_kernels pool_kernels cross_entropy normalise_kernel batch_norm_kernels windows turn_weight)
# Hopper's asynchronous copies and products, which the other tools do not follow.
CONVOLUTIONS=(fast_patches fast_rows fast_eager)
# Else an access past a tensor may end in another one. Captures in CUDA graphs cannot do without.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# With every launch the tools look at Python's frames, which keeps what is local there alive; what is put
# off then runs in other steps, with other rounding.
SKIP="not graph and not another_stream"
# initcheck does not see what some of cuDNN's kernels for Hopper store, and reports whoever reads it.
FOREIGN=" and not deep_layers"
command -v compute-sanitizer >/dev/null || {
    echo "sanitize: no compute-sanitizer here: add the CUDA toolkit's bin folder to PATH" >&2
    exit 1
}

logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT

# sanitize [pytest's arguments] TOOL FILE: one line, and the whole output where something was found.
sanitize() {
    local tool=${*: -2:1} file=${*: -1} status=0 skip=$SKIP
    [[ $tool == initcheck ]] && skip+=$FOREIGN
    local log="$LOGS/$tool.$file"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -m gpu -k "$skip" \
        --sample 3 "${@:1:$#-2}" "segblocks/tests/test_$file.py" >"$log" 2>&1 || status=$?
    ((status == 0)) || cat "$log"
    echo "sanitize: $tool $file: exit status $status; $(grep -a ' passed\| failed' "$log" | tail -1)" \
        "$(grep -a 'SUMMARY' "$log" | tail -1)"
    return $((status != 0)) # 255 would keep xargs from the others
}
export -f sanitize
export LOGS=$logs SKIP FOREIGN

for tool in ${TOOLS:-memcheck racecheck initcheck}; do
    files=("${FILES[@]}")
    [[ $tool == memcheck ]] && files+=("${CONVOLUTIONS[@]}")
    printf "$tool %s\n" "${files[@]}"
done | xargs -P "${JOBS:-4}" -L 1 bash -c 'sanitize "$@"' sanitize "$@" || {
    echo "sanitize: something was found" >&2
    exit 1
}
