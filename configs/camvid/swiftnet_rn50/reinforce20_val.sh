#!/usr/bin/env bash
# SwiftNet-RN50 on CamVid, 20 % of the blocks at full resolution: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name camvid/swiftnet_rn50/reinforce20 --resume-best y \
    --dataset camvid --backbone resnet50 \
    --segblocks-policy reinforce --segblocks-percent-target 0.2 --segblocks-block-size 64 \
    "$@"
