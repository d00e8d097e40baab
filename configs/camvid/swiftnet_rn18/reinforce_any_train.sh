#!/usr/bin/env bash
# SwiftNet-RN18 on CamVid, any share of the blocks at full resolution: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name camvid/swiftnet_rn18/reinforce_any \
    --dataset camvid --backbone resnet18 \
    --pretrain-backbone no --res 480 --crop-res 384 512 --scale-min 0.5 --scale-max 1.667 \
    --epochs 300 --val-every 25 --batch-size 8 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 64 \
    --segblocks-calibrate val --segblocks-normalise-advantage yes --segblocks-entropy-weight 0.5 \
    --segblocks-reward balanced --segblocks-policy-wd-factor 30 --segblocks-policy-epochs 1/20 \
    --segblocks-place-weight 2 --segblocks-recolour yes --segblocks-refine-epochs 1/20 \
    --segblocks-budgets 0.2 1.0 --segblocks-budget-power 24 \
    "$@"
