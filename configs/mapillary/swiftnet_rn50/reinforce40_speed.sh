#!/usr/bin/env bash
# SwiftNet-RN50 on Mapillary Vistas, 40 % of the blocks at full resolution: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name mapillary/swiftnet_rn50/reinforce40 --resume-best y \
    --dataset mapillary --backbone resnet50 \
    --val-res 2048 --speed-images 1 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 128 \
    "$@"
