#!/usr/bin/env bash
# SwiftNet-EffL1 on Cityscapes, 20 % of the blocks at full resolution: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name cityscapes/swiftnet_effl1/reinforce20 --resume-best y \
    --dataset cityscapes --backbone efficientnet_lite1 \
    --segblocks-policy reinforce --segblocks-percent-target 0.2 --segblocks-block-size 128 \
    "$@"
