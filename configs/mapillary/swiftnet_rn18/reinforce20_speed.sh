#!/usr/bin/env bash
# SwiftNet-RN18 on Mapillary Vistas, 20 % of the blocks at full resolution: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name mapillary/swiftnet_rn18/reinforce20 --resume-best y \
    --dataset mapillary --backbone resnet18 \
    --val-res 2048 --speed-images 1 \
    --segblocks-policy reinforce --segblocks-percent-target 0.2 --segblocks-block-size 128 \
    "$@"
