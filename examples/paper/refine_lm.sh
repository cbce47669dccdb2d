#!/usr/bin/env bash
# RefineLM: SynthLM continued on 300 B tokens of real text alone, the costly way to repair it.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"

start_from SYNTH_LM "the checkpoint directory of SynthLM"
need_data REAL "weights and prefixes of real text, e.g. '0.7 /data/web_text_document 0.3 /data/code_text_document'"
blend 1 REAL
continue_on CONTINUE_TOKENS
