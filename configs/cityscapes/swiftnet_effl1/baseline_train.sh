#!/usr/bin/env bash
# SwiftNet-EffL1 on Cityscapes, dense: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name cityscapes/swiftnet_effl1/baseline \
    --dataset cityscapes --backbone efficientnet_lite1 \
    --pretrain-backbone yes --res 2048 --crop-res 1024 --epochs 350 --batch-size 8 \
    --loss bootstrap_ce \
    "$@"
