#!/usr/bin/env bash
# SwiftNet-RN18 on synthetic street scenes, dense: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name synthetic/swiftnet_rn18/baseline \
    --dataset synthetic --synthetic-size 256 512 --backbone resnet18 \
    --pretrain-backbone no --res 512 --crop-res 256 --scale-min 0.75 --scale-max 1.25 \
    --epochs 3 --batch-size 8 --log-every 20 \
    "$@"
