#!/usr/bin/env bash
# SwiftNet-RN18 on Mapillary Vistas, 20 % of the blocks at full resolution: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name mapillary/swiftnet_rn18/reinforce20 --resume-best y \
    --dataset mapillary --backbone resnet18 \
    --val-res 2048 \
    --segblocks-policy reinforce --segblocks-percent-target 0.2 --segblocks-block-size 128 \
    "$@"
