#!/usr/bin/env bash
# SwiftNet-RN50 on Cityscapes, dense: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name cityscapes/swiftnet_rn50/baseline --resume-best y \
    --dataset cityscapes --backbone resnet50 \
    "$@"
