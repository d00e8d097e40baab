#!/usr/bin/env bash
# SwiftNet-RN18 on Mapillary Vistas, dense: validate.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode val --name mapillary/swiftnet_rn18/baseline --resume-best y \
    --dataset mapillary --backbone resnet18 \
    --val-res 2048 \
    "$@"
