#!/usr/bin/env bash
# SwiftNet-RN18 on CamVid, 20 % of the blocks at full resolution: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name camvid/swiftnet_rn18/reinforce20 --resume-best y \
    --dataset camvid --backbone resnet18 \
    --segblocks-policy reinforce --segblocks-percent-target 0.2 --segblocks-block-size 64 \
    "$@"
