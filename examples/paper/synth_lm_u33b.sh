#!/usr/bin/env bash
# SynthLM* (U33B): BaseLM continued on 40 B tokens of real text with 2% reasoning paths of GSM8K.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"

start_from BASE_LM "the checkpoint directory of BaseLM"
need_data REAL "weights and prefixes of real text, e.g. '0.7 /data/web_text_document 0.3 /data/code_text_document'"
need_data U33B "weights and prefixes of U33B, the reasoning paths of GSM8K"
blend "$(real_share)" REAL "$SYNTHETIC_SHARE" U33B
continue_on ABLATION_TOKENS
