#!/usr/bin/env bash
# SwiftNet-RN18 on CamVid, dense: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name camvid/swiftnet_rn18/baseline \
    --dataset camvid --backbone resnet18 \
    --pretrain-backbone no --res 480 --crop-res 384 512 --scale-min 0.5 --scale-max 1.667 \
    --epochs 300 --val-every 25 --batch-size 8 \
    "$@"
