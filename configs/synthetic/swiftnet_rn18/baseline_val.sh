#!/usr/bin/env bash
# SwiftNet-RN18 on synthetic street scenes, dense: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name synthetic/swiftnet_rn18/baseline --resume-best y \
    --dataset synthetic --synthetic-size 256 512 --backbone resnet18 \
    "$@"
