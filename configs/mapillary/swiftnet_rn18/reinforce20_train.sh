#!/usr/bin/env bash
# SwiftNet-RN18 on Mapillary Vistas, 20 % of the blocks at full resolution: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name mapillary/swiftnet_rn18/reinforce20 \
    --dataset mapillary --backbone resnet18 \
    --pretrain-backbone yes --res 2048 --crop-res 1024 --val-res 2048 --epochs 60 --batch-size 8 \
    --segblocks-policy reinforce --segblocks-percent-target 0.2 --segblocks-block-size 128 \
    "$@"
