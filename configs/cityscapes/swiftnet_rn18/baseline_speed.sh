#!/usr/bin/env bash
# SwiftNet-RN18 on Cityscapes, dense: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name cityscapes/swiftnet_rn18/baseline --resume-best y \
    --dataset cityscapes --backbone resnet18 \
    "$@"
