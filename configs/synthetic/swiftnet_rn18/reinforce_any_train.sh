#!/usr/bin/env bash
# SwiftNet-RN18 on synthetic street scenes, any share of the blocks at full resolution: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name synthetic/swiftnet_rn18/reinforce_any \
    --dataset synthetic --synthetic-size 256 512 --backbone resnet18 \
    --synthetic-train-images 400 --pretrain-backbone no --res 512 --crop-res 256 \
    --scale-min 0.75 --scale-max 1.25 --epochs 4 --batch-size 4 --lr 1e-3 --val-every 0 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 64 \
    --segblocks-budgets 0.1 1.0 \
    --segblocks-policy-lr-factor 2 \
    "$@"
