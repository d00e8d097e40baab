#!/usr/bin/env bash
# SwiftNet-RN50 on Cityscapes, 40 % of the blocks at full resolution: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name cityscapes/swiftnet_rn50/reinforce40 --resume-best y \
    --dataset cityscapes --backbone resnet50 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 128 \
    "$@"
