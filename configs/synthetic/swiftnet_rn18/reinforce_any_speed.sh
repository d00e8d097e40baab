#!/usr/bin/env bash
# SwiftNet-RN18 on synthetic street scenes, any share of the blocks at full resolution: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name synthetic/swiftnet_rn18/reinforce_any --resume-best y \
    --dataset synthetic --synthetic-size 256 512 --backbone resnet18 \
    --segblocks-policy reinforce --segblocks-percent-target 0.4 --segblocks-block-size 64 \
    --budget 0.2 0.4 0.6 \
    "$@"
