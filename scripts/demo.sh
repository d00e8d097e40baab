#!/usr/bin/env bash
# The whole loop on synthetic street scenes: train a policy, validate it, time it, show it.
# About ten minutes on two CPU cores, set-up included; larger with a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
if [[ -n "${SEGBLOCKS_SKIP_SETUP:-}" ]]; then
    export PYTHON="${PYTHON:-python3}" PYTHONPATH="$PWD/segblocks${PYTHONPATH:+:$PYTHONPATH}"
else
    export PYTHON="$PWD/.venv/bin/python"
fi
CONFIGS=configs/synthetic/swiftnet_rn18
OUT="${1:-exp/demo}"

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "demo: CUDA device found, the larger setting: 1024×512 scenes, blocks of 128"
    SCENES=(--synthetic-size 512 1024 --segblocks-block-size 128 --synthetic-val-images 200)
    TRAINING=(--synthetic-train-images 2000 --res 1024 --crop-res 512 --epochs 8 --batch-size 8)
    SPEED=(--speed-images 16 --speed-repeats 100)
else
    echo "demo: no CUDA device, the small setting: 512×256 scenes, blocks of 64"
    SCENES=(--synthetic-size 256 512 --segblocks-block-size 64 --synthetic-val-images 50)
    TRAINING=(--log-every 25)
    SPEED=(--speed-images 8 --speed-repeats 16)
fi
COMMON=(--exp-dir "$OUT" "${SCENES[@]}")

echo "demo: training"
$CONFIGS/reinforce40_train.sh "${COMMON[@]}" --name reinforce40 --resume none "${TRAINING[@]}"
echo "demo: validating, with pictures"
$CONFIGS/reinforce40_val.sh "${COMMON[@]}" --name reinforce40 --viz policy pred
echo "demo: validating the same network with as many blocks placed at random, and with all high"
SHARE="$("$PYTHON" scripts/demo_table.py --share "$OUT")"
OTHER=("${COMMON[@]}" --resume-best no --resume "$OUT/reinforce40/checkpoint_best.pth")
$CONFIGS/reinforce40_val.sh "${OTHER[@]}" --name random --segblocks-policy random --budget "$SHARE"
$CONFIGS/reinforce40_val.sh "${OTHER[@]}" --name all_high --budget 100%
echo "demo: timing"
$CONFIGS/reinforce40_speed.sh "${COMMON[@]}" --name reinforce40 "${SPEED[@]}"
"$PYTHON" scripts/demo_table.py "$OUT"
