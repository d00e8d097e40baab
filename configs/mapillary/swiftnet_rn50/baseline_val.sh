#!/usr/bin/env bash
# SwiftNet-RN50 on Mapillary Vistas, dense: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name mapillary/swiftnet_rn50/baseline --resume-best y \
    --dataset mapillary --backbone resnet50 \
    --val-res 2048 \
    "$@"
