#!/usr/bin/env bash
# SwiftNet-RN18 on synthetic street scenes, 20 % of the blocks at full resolution: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name synthetic/swiftnet_rn18/reinforce20 --resume-best y \
    --dataset synthetic --synthetic-size 256 512 --backbone resnet18 \
    --segblocks-policy reinforce --segblocks-percent-target 0.2 --segblocks-block-size 64 \
    "$@"
