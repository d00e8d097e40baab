#!/usr/bin/env bash
# SwiftNet-EffL1 on Cityscapes, dense: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name cityscapes/swiftnet_effl1/baseline --resume-best y \
    --dataset cityscapes --backbone efficientnet_lite1 \
    "$@"
