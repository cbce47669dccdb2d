#!/usr/bin/env bash
# NonSynthLM: BaseLM continued on 40 B tokens of the real text of MixSynthLM alone.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"

start_from BASE_LM "the checkpoint directory of BaseLM"
need_data REAL "weights and prefixes of real text, e.g. '0.7 /data/web_text_document 0.3 /data/code_text_document'"
blend 1 REAL
continue_on ABLATION_TOKENS
