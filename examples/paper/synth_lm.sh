#!/usr/bin/env bash
# SynthLM: BaseLM continued on 300 B tokens of real text with 2% synthetic question-answer pairs.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"

start_from BASE_LM "the checkpoint directory of BaseLM"
need_data REAL "weights and prefixes of real text, e.g. '0.7 /data/web_text_document 0.3 /data/code_text_document'"
need_data SYNTHETIC "weights and prefixes of synthetic question-answer text"
blend "$(real_share)" REAL "$SYNTHETIC_SHARE" SYNTHETIC
continue_on CONTINUE_TOKENS
