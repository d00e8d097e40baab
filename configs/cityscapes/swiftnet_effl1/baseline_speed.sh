#!/usr/bin/env bash
# SwiftNet-EffL1 on Cityscapes, dense: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name cityscapes/swiftnet_effl1/baseline --resume-best y \
    --dataset cityscapes --backbone efficientnet_lite1 \
    "$@"
