#!/usr/bin/env bash
# SwiftNet-RN18 on synthetic street scenes, dense: train.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode train --name synthetic/swiftnet_rn18/baseline \
    --dataset synthetic --synthetic-size 256 512 --backbone resnet18 \
    --synthetic-train-images 400 --pretrain-backbone no --res 512 --crop-res 256 \
    --scale-min 0.75 --scale-max 1.25 --epochs 4 --batch-size 4 --lr 1e-3 --val-every 0 \
    "$@"
