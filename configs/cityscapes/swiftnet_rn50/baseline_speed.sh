#!/usr/bin/env bash
# SwiftNet-RN50 on Cityscapes, dense: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name cityscapes/swiftnet_rn50/baseline --resume-best y \
    --dataset cityscapes --backbone resnet50 \
    "$@"
