#!/usr/bin/env bash
# SwiftNet-RN50 on Cityscapes, 40 % of the blocks at full resolution: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name cityscapes/swiftnet_rn50/reinforce40 \
    --dataset cityscapes --backbone resnet50 \
    --pretrain-backbone yes --res 2048 --crop-res 1024 --epochs 350 --batch-size 8 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 128 \
    "$@"
