#!/usr/bin/env bash
# SwiftNet-RN50 on CamVid, dense: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name camvid/swiftnet_rn50/baseline \
    --dataset camvid --backbone resnet50 \
    --pretrain-backbone no --res 480 --crop-res 384 512 --scale-min 0.5 --scale-max 1.667 \
    --epochs 110 --val-every 10 --batch-size 8 \
    "$@"
