#!/usr/bin/env bash
# The kernels under compute-sanitizer (of the CUDA toolkit; PATH has to lead to it): no access out of
# bounds, no race, no read of memory that nobody wrote. Needs a GPU. Takes some seconds a test, so of
# each test only some parametrisations run; arguments go to pytest (--sample 20 for more).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-$PWD/.venv/bin/python}"
FILES=(segblocks/tests/test_{cuda_kernels,pool_kernels,cross_entropy,normalise_kernel}.py
    segblocks/tests/test_{batch_norm_kernels,windows,turn_weight}.py)
# Hopper's asynchronous copies and products, which the other tools do not follow.
CONVOLUTIONS=(segblocks/tests/test_fast_{patches,eager}.py)
# Else an access past a tensor may end in another one. Captures in CUDA graphs cannot do without.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# With every launch the tools look at Python's frames, which keeps what is local there alive; what is put
# off then runs in other steps, with other rounding.
SKIP="not graph and not another_stream"

failed=0
for tool in ${TOOLS:-memcheck racecheck initcheck}; do
    echo "sanitize: $tool"
    files=("${FILES[@]}")
    [[ $tool == memcheck ]] && files+=("${CONVOLUTIONS[@]}")
    compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$PYTHON" -m pytest -q -m gpu -k "$SKIP" --sample 3 "${files[@]}" "$@" || failed=1
done
exit $failed
