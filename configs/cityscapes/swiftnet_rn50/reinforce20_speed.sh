#!/usr/bin/env bash
# SwiftNet-RN50 on Cityscapes, 20 % of the blocks at full resolution: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name cityscapes/swiftnet_rn50/reinforce20 --resume-best y \
    --dataset cityscapes --backbone resnet50 \
    --segblocks-policy reinforce --segblocks-percent-target 0.2 --segblocks-block-size 128 \
    "$@"
