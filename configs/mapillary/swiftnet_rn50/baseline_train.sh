#!/usr/bin/env bash
# SwiftNet-RN50 on Mapillary Vistas, dense: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name mapillary/swiftnet_rn50/baseline \
    --dataset mapillary --backbone resnet50 \
    --pretrain-backbone yes --res 2048 --crop-res 1024 --val-res 2048 --epochs 60 --batch-size 8 \
    "$@"
