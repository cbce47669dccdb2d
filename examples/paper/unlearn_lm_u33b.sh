#!/usr/bin/env bash
# UnlearnLM* (U33B): SynthLM* forgets 1 B tokens of U33B, and replays as many of real text.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"

start_from SYNTH_LM_U33B "the checkpoint directory of SynthLM*"
need_data REAL "weights and prefixes of real text, e.g. '0.7 /data/web_text_document 0.3 /data/code_text_document', that the model was trained on"
need_data U33B "weights and prefixes of U33B, the reasoning paths of GSM8K, to forget"
blend 1 REAL
unlearn U33B
