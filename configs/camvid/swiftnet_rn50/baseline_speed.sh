#!/usr/bin/env bash
# SwiftNet-RN50 on CamVid, dense: time.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
run --mode speed --name camvid/swiftnet_rn50/baseline --resume-best y \
    --dataset camvid --backbone resnet50 \
    "$@"
