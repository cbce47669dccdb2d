#!/usr/bin/env bash
# BaseLM: pre-training from scratch on 1 T tokens of real text.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"

need_data REAL "weights and prefixes of real text, e.g. '0.7 /data/web_text_document 0.3 /data/code_text_document'"
blend 1 REAL
pretrain BASE_TOKENS --lr "$BASE_LR" --min-lr "$BASE_MIN_LR" --lr-decay-style cosine \
    --lr-warmup-iters "$BASE_WARMUP_ITERATIONS"
