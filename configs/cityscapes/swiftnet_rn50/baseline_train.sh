#!/usr/bin/env bash
# SwiftNet-RN50 on Cityscapes, dense: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name cityscapes/swiftnet_rn50/baseline \
    --dataset cityscapes --backbone resnet50 \
    --pretrain-backbone yes --res 2048 --crop-res 1024 --epochs 350 --batch-size 8 \
    "$@"
