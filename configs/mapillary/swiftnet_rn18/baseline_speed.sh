#!/usr/bin/env bash
# SwiftNet-RN18 on Mapillary Vistas, dense: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name mapillary/swiftnet_rn18/baseline --resume-best y \
    --dataset mapillary --backbone resnet18 \
    --val-res 2048 --speed-images 1 \
    "$@"
