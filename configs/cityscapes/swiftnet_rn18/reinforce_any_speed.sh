#!/usr/bin/env bash
# SwiftNet-RN18 on Cityscapes, any share of the blocks at full resolution: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name cityscapes/swiftnet_rn18/reinforce_any --resume-best y \
    --dataset cityscapes --backbone resnet18 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 128 \
    --budget 0.2 0.4 0.6 \
    "$@"
