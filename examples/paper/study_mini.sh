#!/usr/bin/env bash
# Every recipe, unchanged, with sizes/mini.sh, in the order of the study. On the data of `make demo` unless DATA names
# another folder; words behind the command go on to every recipe (--dry-run, --exit-interval 5).
#
#   PYTHON=.venv/bin/python CHAT_DATA=conversations.jsonl examples/paper/study_mini.sh
#
# A second call goes on where the first was stopped. Without CHAT_DATA no chat models are made. U33B is the demo's
# synthetic text unless another dataset is named.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DATA=${DATA:-$HERE/../../runs/demo/data}
STUDY=${STUDY:-$HERE/../../runs/study-mini}
export SIZE=${SIZE:-$HERE/sizes/mini.sh}
export TOKENIZER=${TOKENIZER:-$DATA/tokenizer.model}
export REAL=${REAL:-$DATA/real_text_document}
export SYNTHETIC=${SYNTHETIC:-$DATA/synthetic_text_document}
export U33B=${U33B:-$SYNTHETIC}
# Datasets are indexed once for all recipes.
export DATA_CACHE=${DATA_CACHE:-$STUDY/data-cache}
# Where each model lies for the recipes that start from it.
export BASE_LM=$STUDY/base_lm SYNTH_LM=$STUDY/synth_lm SYNTH_LM_U33B=$STUDY/synth_lm_u33b

models=(
    base_lm
    synth_lm mix_synth_lm non_synth_lm synth_lm_u33b
    refine_lm unlearn_lm unlearn_lm_ga unlearn_lm_u33b
)
for model in "${models[@]}"; do
    echo "== $model"
    OUT=$STUDY/$model "$HERE/$model.sh" "$@"
done
if [[ -z ${CHAT_DATA:-} ]]; then
    echo "== no chat models: CHAT_DATA is not set"
    exit
fi
for model in "${models[@]}"; do
    echo "== $model, chat"
    MODEL=$STUDY/$model OUT=$STUDY/${model}_chat "$HERE/chat.sh" "$@"
done
