#!/usr/bin/env bash
# SwiftNet-RN18 on Cityscapes, any share of the blocks at full resolution: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name cityscapes/swiftnet_rn18/reinforce_any \
    --dataset cityscapes --backbone resnet18 \
    --pretrain-backbone yes --res 2048 --crop-res 1024 --epochs 350 --batch-size 8 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 128 \
    --segblocks-budgets 0.1 1.0 \
    "$@"
