#!/usr/bin/env bash
# SwiftNet-RN18 on Cityscapes, any share of the blocks at full resolution: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name cityscapes/swiftnet_rn18/reinforce_any --resume-best y \
    --dataset cityscapes --backbone resnet18 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 128 \
    --budget 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1.0 \
    "$@"
