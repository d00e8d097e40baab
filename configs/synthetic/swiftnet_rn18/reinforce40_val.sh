#!/usr/bin/env bash
# SwiftNet-RN18 on synthetic street scenes, 40 % of the blocks at full resolution: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name synthetic/swiftnet_rn18/reinforce40 --resume-best y \
    --dataset synthetic --synthetic-size 256 512 --backbone resnet18 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 64 \
    "$@"
