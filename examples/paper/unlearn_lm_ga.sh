#!/usr/bin/env bash
# UnlearnLM (GA): UnlearnLM with gradient ascent, which has no lower bound, as the forgetting loss.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
begin "$@"

start_from SYNTH_LM "the checkpoint directory of SynthLM"
need_data REAL "weights and prefixes of real text, e.g. '0.7 /data/web_text_document 0.3 /data/code_text_document', that the model was trained on"
need_data SYNTHETIC "weights and prefixes of synthetic question-answer text, to forget"
blend 1 REAL
unlearn SYNTHETIC --forget-loss gradient-ascent
