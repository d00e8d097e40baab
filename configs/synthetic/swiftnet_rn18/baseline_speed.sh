#!/usr/bin/env bash
# SwiftNet-RN18 on synthetic street scenes, dense: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name synthetic/swiftnet_rn18/baseline --resume-best y \
    --dataset synthetic --synthetic-size 256 512 --backbone resnet18 \
    "$@"
