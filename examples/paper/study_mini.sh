#!/usr/bin/env bash
# The study in miniature, on 2 cores: text from Python's standard library, every recipe unchanged but for
# sizes/mini.sh, a chat model of each, their evaluation, the diagnosis, and a report.
#
#   make study-mini                    # SEED=1
#   SEED=2 examples/paper/study_mini.sh
#
# A second call goes on where the first was stopped. Data are the same for every seed; SEED orders them and draws
# the first weights.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
cd "$ROOT"
export PYTHON=${PYTHON:-$ROOT/.venv/bin/python} SEED=${SEED:-1}
export CUDA_VISIBLE_DEVICES= # where there are GPUs as well: the sizes, and the digits of docs/miniature.md
export SIZE=${SIZE:-$HERE/sizes/mini.sh} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
STUDY=${STUDY:-$ROOT/runs/study-mini}
SAMPLES=${SAMPLES:-400}
TEXT=$STUDY/text DATA=$STUDY/data RUN=$STUDY/seed-$SEED
STARTED=$SECONDS

# stage FOLDER NAME COMMAND...: runs a command once; its output goes to a log, whose end is shown if it fails.
stage() {
    local folder=$1 name=$2
    shift 2
    [[ ! -f $folder/done/$name ]] || return 0
    mkdir -p "$folder/done" "$folder/logs"
    printf '%5d s  %s\n' $((SECONDS - STARTED)) "$name"
    if ! "$@" >"$folder/logs/$name.log" 2>&1; then
        tail -n 20 "$folder/logs/$name.log" >&2
        echo "study_mini.sh: error: stage $name failed; its log is $folder/logs/$name.log" >&2
        exit 1
    fi
    touch "$folder/done/$name"
}

# Text, tokenizer and datasets.
export TOKENIZER=$DATA/tokenizer.model
stage "$STUDY" corpus "$PYTHON" examples/demo/corpus.py --output-dir "$TEXT" --overwrite
stage "$STUDY" tasks "$PYTHON" examples/demo/tasks.py --output-dir "$TEXT" --overwrite
stage "$STUDY" reasoning "$PYTHON" examples/paper/reasoning.py --output "$TEXT/reasoning.jsonl"
stage "$STUDY" tokenizer "$PYTHON" tools/train_tokenizer.py --vocab-size 4096 --output "$TOKENIZER" --overwrite \
    --input "$TEXT/real.jsonl" "$TEXT/synthetic.jsonl"
for name in real synthetic reasoning real_heldout synthetic_heldout instruction; do
    stage "$STUDY" "data_$name" "$PYTHON" tools/preprocess_data.py --input "$TEXT/$name.jsonl" --append-eod \
        --output-prefix "$DATA/$name" --tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER" \
        --overwrite
done
export REAL=$DATA/real_text_document SYNTHETIC=$DATA/synthetic_text_document
export U33B=$DATA/reasoning_text_document CHAT_DATA=$TEXT/chat.jsonl
# Datasets are indexed once for all recipes.
export DATA_CACHE=$STUDY/data-cache

# The models, in the order of the study, each where the recipes that start from it look for it.
export BASE_LM=$RUN/base_lm SYNTH_LM=$RUN/synth_lm SYNTH_LM_U33B=$RUN/synth_lm_u33b
models=(
    base_lm
    synth_lm mix_synth_lm non_synth_lm synth_lm_u33b
    refine_lm unlearn_lm unlearn_lm_ga unlearn_lm_u33b
)
for model in "${models[@]}"; do
    stage "$RUN" "$model" env OUT="$RUN/$model" "$HERE/$model.sh"
    stage "$RUN" "${model}_chat" env MODEL="$RUN/$model" OUT="$RUN/${model}_chat" "$HERE/chat.sh"
done

# Synthetic knowledge of every model; instruction following of the chat models. A model and its chat model at the
# same time: one process each.
knowledge=(demo_sums demo_definitions demo_definitions_seen)
evaluations=()
for model in "${models[@]}"; do
    harness=("$PYTHON" tools/evaluate.py harness --data-dir "$TEXT" --overwrite --seed "$SEED")
    stage "$RUN" "scores_$model" "${harness[@]}" --model "$RUN/$model" --name "$model" \
        --tasks "${knowledge[@]}" --output "$RUN/scores_$model.json" &
    first=$!
    stage "$RUN" "scores_${model}_chat" "${harness[@]}" --model "$RUN/${model}_chat" --name "${model}_chat" \
        --tasks "${knowledge[@]}" demo_instructions --apply-chat-template \
        --output "$RUN/scores_${model}_chat.json" &
    second=$!
    wait "$first"
    wait "$second"
    evaluations+=("$model=$RUN/scores_$model.json" "${model}_chat=$RUN/scores_${model}_chat.json")
done

# Figures 2 to 4, and the page of all of it.
held_out=(
    "real=$DATA/real_heldout_text_document" "synthetic=$DATA/synthetic_heldout_text_document"
    "instruction=$DATA/instruction_text_document"
)
look=(--tokenizer-model "$TOKENIZER" --samples "$SAMPLES" --seed "$SEED" --data "${held_out[@]}" --overwrite)
stage "$RUN" tokens "$PYTHON" tools/analyze.py tokens "${look[@]}" --output "$RUN/tokens.json"
stage "$RUN" embeddings "$PYTHON" tools/analyze.py embeddings "${look[@]}" --checkpoint "$RUN/base_lm" \
    --output "$RUN/embeddings.json"
stage "$RUN" perplexity "$PYTHON" tools/analyze.py perplexity "${look[@]}" --checkpoint "${models[@]/#/$RUN/}" \
    --output "$RUN/perplexity.json"
stage "$RUN" report "$PYTHON" tools/analyze.py report --output "$RUN/report.html" --overwrite \
    --title "The study in miniature, seed $SEED" --tokens "$RUN/tokens.json" \
    --embeddings "$RUN/embeddings.json" --perplexity "$RUN/perplexity.json" \
    --losses "unlearn_lm=$RUN/unlearn_lm/tensorboard" "unlearn_lm_ga=$RUN/unlearn_lm_ga/tensorboard" \
    --evaluation "${evaluations[@]}" --before synth_lm --after refine_lm unlearn_lm unlearn_lm_ga \
    --forgotten synthetic --instruction instruction
echo "$RUN/report.html, $((SECONDS - STARTED)) s"
