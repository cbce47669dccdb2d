# shellcheck shell=bash
# What all recipes share: the settings they ask for, tokens turned into iterations, blends, and the launch.
# A recipe sources this file, calls `begin "$@"`, names what it needs, and ends with one of the stages
# at the bottom. Sizes come from $SIZE, by default sizes/paper.sh.

RECIPES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$RECIPES/../.." && pwd)

fail() {
    echo "${0##*/}: error: $*" >&2
    exit 2
}

# begin WORD...: reads the recipe's own words and its sizes. --dry-run prints the plan and starts nothing; all
# other words go on to pretrain_unlearn.py, behind the recipe's flags.
begin() {
    ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash 4.4 or newer is needed"
    DRY_RUN=${DRY_RUN:-0}
    [[ $DRY_RUN == [01] ]] || fail "DRY_RUN: expected 0 or 1, found $DRY_RUN"
    EXTRA=()
    START=()
    ARCHITECTURE=()
    DATASET_LOG=(--dataset-log-interval 10)
    local word
    for word; do
        case $word in
            --dry-run) DRY_RUN=1 ;;
            # Mistyped, it would start the run.
            -[Dd]ry* | --[Dd]ry* | -DRY* | --DRY*) fail "$word: expected --dry-run, found an unknown flag" ;;
            *) EXTRA+=("$word") ;;
        esac
    done
    SIZE=${SIZE:-$RECIPES/sizes/paper.sh}
    [[ -f $SIZE ]] || fail "SIZE: expected a file of sizes, found nothing at $SIZE"
    read_sizes
    PYTHON=${PYTHON:-python}
    # A container's Python cannot be looked for from outside.
    [[ -n ${CONTAINER_IMAGE:-} ]] || command -v "$PYTHON" >/dev/null || fail "PYTHON: $PYTHON cannot be run"
    TOKENIZER_TYPE=${TOKENIZER_TYPE:-SentencePieceTokenizer}
    need OUT "the folder for checkpoints, losses and logs"
    need TOKENIZER "the tokenizer that the data were tokenised with"
    # A Hugging Face tokenizer may be a name instead of a path.
    [[ -e $TOKENIZER || $TOKENIZER_TYPE == HuggingFaceTokenizer ]] ||
        fail "TOKENIZER: nothing at $TOKENIZER"
    need_integers TP PP MICRO_BATCH GPUS_PER_NODE \
        "${GLOBAL_BATCH:+GLOBAL_BATCH}" "${FORGET_BATCH:+FORGET_BATCH}"
}

# read_sizes: reads $SIZE, and the file of an imported model; the environment's context and budgets win over both.
read_sizes() {
    local name given=()
    for name in SEQ_LENGTH BASE_TOKENS CONTINUE_TOKENS ABLATION_TOKENS FORGET_TOKENS; do
        [[ -n ${!name:-} ]] || continue
        need_integers "$name"
        given+=("$name=${!name}")
    done
    # shellcheck source=sizes/paper.sh
    source "$SIZE"
    [[ -z ${MODEL_ARGS:-} ]] || read_model
    for name in "${given[@]}"; do
        printf -v "${name%%=*}" %s "${name#*=}"
    done
}

# read_model: sets ARCHITECTURE and SEQ_LENGTH from the file that the import of a model wrote; TOKENIZER and
# TOKENIZER_TYPE as well, unless they are set.
read_model() {
    [[ -f $MODEL_ARGS ]] || fail "MODEL_ARGS: expected the ARGS.txt of an imported model, found no file $MODEL_ARGS"
    local words i length='' tokenizer='' kind=''
    read -r -d '' -a words <"$MODEL_ARGS" || true
    for ((i = 0; i < ${#words[@]}; i++)); do
        case ${words[i]} in
            --seq-length) length=${words[++i]:-} ;;
            --tokenizer-model) tokenizer=${words[++i]:-} ;;
            --tokenizer-type) kind=${words[++i]:-} ;;
            *) ARCHITECTURE+=("${words[i]}") ;;
        esac
    done
    [[ " ${ARCHITECTURE[*]} " == *" --num-layers "* && $length =~ ^[1-9][0-9]*$ ]] ||
        fail "MODEL_ARGS: expected flags of a model, with --num-layers and --seq-length, found others in $MODEL_ARGS"
    SEQ_LENGTH=$length
    [[ -n ${TOKENIZER:-} || $tokenizer != /* || -e $tokenizer ]] ||
        fail "TOKENIZER: expected it to be set, for $MODEL_ARGS names $tokenizer, found nothing there"
    TOKENIZER=${TOKENIZER:-$tokenizer}
    TOKENIZER_TYPE=${TOKENIZER_TYPE:-$kind}
}

# need VARIABLE MEANING: refuses an unset or empty variable.
need() {
    [[ -n ${!1:-} ]] || fail "$1 is not set: $2"
}

need_integers() {
    local name
    for name; do
        [[ -z $name || ${!name} =~ ^[1-9][0-9]*$ ]] ||
            fail "$name: expected a positive whole number, found ${!name}"
    done
}

# start_from VARIABLE MEANING: the checkpoint whose weights the run begins with. A dry run may come before it exists.
start_from() {
    need "$1" "$2"
    local directory=${!1}
    [[ $(realpath -m "$directory") != $(realpath -m "$OUT") ]] ||
        fail "OUT: expected another folder than $1, found $directory for both"
    if [[ ! -f $directory/latest_checkpointed_iteration.txt ]]; then
        ((DRY_RUN)) || fail "$1: no checkpoint in $directory (no latest_checkpointed_iteration.txt)"
        echo "note: $1: no checkpoint in $directory yet"
    fi
    START=(--pretrained-checkpoint "$directory")
}

# words_of VARIABLE: sets WORDS to the words of a variable, on however many lines they are.
words_of() {
    # read ends at NUL, which is not there, and says so.
    read -r -d '' -a WORDS <<<"${!1:-}" || true
}

# need_data VARIABLE MEANING: a prefix, or weights and prefixes in turn, of datasets that exist.
need_data() {
    need "$1" "$2"
    words_of "$1"
    local words=("${WORDS[@]}") i
    ((${#words[@]} == 1)) && words=(1 "${words[@]}")
    ((${#words[@]} > 0 && ${#words[@]} % 2 == 0)) ||
        fail "$1: expected one prefix, or weights and prefixes in turn, found ${words[*]:-nothing}"
    for ((i = 0; i < ${#words[@]}; i += 2)); do
        [[ ${words[i]} =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ && ${words[i]} =~ [1-9] ]] ||
            fail "$1: expected a weight above 0, found ${words[i]}"
        [[ -f ${words[i + 1]}.idx && -f ${words[i + 1]}.bin ]] ||
            fail "$1: no dataset ${words[i + 1]} (.idx and .bin)"
    done
}

# blend SHARE VARIABLE...: sets BLEND to weights and prefixes that add up to 1, each variable's datasets scaled
# to its share.
blend() {
    local words
    BLEND=()
    while (($#)); do
        words_of "$2"
        words=("${WORDS[@]}")
        ((${#words[@]} > 1)) || words=(1 "${words[0]}")
        mapfile -t -O "${#BLEND[@]}" BLEND < <(printf '%s\n' "${words[@]}" | LC_ALL=C awk -v share="$1" '
            NR % 2 { weight[++n] = $0; total += $0; next }
            { prefix[n] = $0 }
            END { for (i = 1; i <= n; i++) printf "%.10g\n%s\n", share * weight[i] / total, prefix[i] }')
        shift 2
    done
}

# The share of real text beside the synthetic one.
real_share() {
    LC_ALL=C awk -v share="$SYNTHETIC_SHARE" 'BEGIN { printf "%.10g", 1 - share }'
}

# iterations TOKENS TOKENS_PER_STEP: rounded up, so that the budget is spent in full.
iterations() {
    echo $((($1 + $2 - 1) / $2))
}

# keep_budget BUDGET: refuses flags behind the recipe by which a run would read more or less than its budget,
# for the iterations were counted without them.
keep_budget() {
    local word variable
    for word in "${EXTRA[@]}"; do
        case ${word%%=*} in
            --train-iters | --train-samples) variable=$1 ;;
            --global-batch-size) variable=GLOBAL_BATCH ;;
            --forget-batch-size)
                # Plain training refuses the flag itself.
                [[ $1 == FORGET_TOKENS ]] || continue
                variable=FORGET_BATCH
                ;;
            --seq-length) variable=SEQ_LENGTH ;;
            *) continue ;;
        esac
        fail "${word%%=*}: expected the variable $variable in its place, from which the iterations follow," \
            "found the flag behind the recipe"
    done
}

# pretrain BUDGET FLAG...: plain training on BLEND for as many tokens as the variable says.
pretrain() {
    local tokens=${!1} batch=${GLOBAL_BATCH:-$LEARN_BATCH}
    keep_budget "$1"
    shift
    launch --global-batch-size "$batch" --data-path "${BLEND[@]}" --split "$SPLIT" \
        --train-iters "$(iterations "$tokens" $((batch * SEQ_LENGTH)))" \
        --save-interval "${SAVE_INTERVAL:-$LEARN_SAVE_INTERVAL}" "${EVALUATION[@]}" "$@"
}

# continue_on BUDGET: plain training from START at the constant rate of the paper.
continue_on() {
    pretrain "$1" --lr "$CONTINUE_LR" --lr-decay-style constant
}

# unlearn VARIABLE FLAG...: forgets the variable's datasets, FORGET_BATCH samples of a batch, and replays BLEND.
unlearn() {
    local replay=("${BLEND[@]}") batch=${GLOBAL_BATCH:-$UNLEARN_BATCH} forget
    ((batch > 1)) || fail "GLOBAL_BATCH: expected at least 2, one to forget and one to replay, found $batch"
    forget=${FORGET_BATCH:-$((batch / 2))}
    ((forget < batch)) ||
        fail "FORGET_BATCH: expected fewer than the $batch samples of a batch, found $forget"
    keep_budget FORGET_TOKENS
    blend 1 "$1"
    shift
    launch --global-batch-size "$batch" --forget-batch-size "$forget" --split "$SPLIT" \
        --forget-data-path "${BLEND[@]}" --data-path "${replay[@]}" \
        --forget-weight "$FORGET_WEIGHT" --replay-weight 1 --mitigation-weight 1 \
        --lr "$UNLEARN_LR" --lr-decay-style constant \
        --train-iters "$(iterations "$FORGET_TOKENS" $((forget * SEQ_LENGTH)))" \
        --save-interval "${SAVE_INTERVAL:-$UNLEARN_SAVE_INTERVAL}" "${EVALUATION[@]}" "$@"
}

# need_files VARIABLE MEANING: one file or several.
need_files() {
    need "$1" "$2"
    local file
    words_of "$1"
    for file in "${WORDS[@]}"; do
        [[ -f $file ]] || fail "$1: no file $file"
    done
}

# tune_chat: chat tuning of START on the files of CHAT_DATA; the entry point counts the iterations of the epochs.
tune_chat() {
    words_of CHAT_DATA
    DATASET_LOG=() # conversations are no blend
    launch --global-batch-size "${GLOBAL_BATCH:-$CHAT_BATCH}" \
        --chat-data-path "${WORDS[@]}" --chat-epochs "$CHAT_EPOCHS" \
        --lr "$CHAT_LR" --lr-decay-style constant --eval-iters 0 \
        --save-interval "${SAVE_INTERVAL:-$UNLEARN_SAVE_INTERVAL}"
}

# launch FLAG...: starts the entry point with the flags of all recipes and these, or prints the plan.
launch() {
    ((${#ARCHITECTURE[@]})) || ARCHITECTURE=(
        --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN"
        --num-attention-heads "$HEADS" --max-position-embeddings "$SEQ_LENGTH"
        --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
        --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
        --make-vocab-size-divisible-by "$VOCAB_DIVISIBLE_BY"
    )
    local flags=(
        "${ARCHITECTURE[@]}" --seq-length "$SEQ_LENGTH"
        --tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER"
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
        --micro-batch-size "$MICRO_BATCH" --seed "${SEED:-1234}"
        "${PRECISION[@]}" "${OPTIMIZER[@]}"
        "${START[@]}" --load "$OUT" --save "$OUT" --tensorboard-dir "$OUT/tensorboard"
        --data-cache-path "${DATA_CACHE:-$OUT/data-cache}" --log-interval 1
        --log-throughput --log-timers-to-tensorboard --log-progress --log-world-size-to-tensorboard
        "${DATASET_LOG[@]}"
        --manual-gc --manual-gc-interval 100
        # SIGTERM (preemption, or shortly before a time limit) saves and ends.
        --exit-signal-handler
    )
    ((TP == 1)) || flags+=(--sequence-parallel)
    flags+=("$@" "${EXTRA[@]}")
    export OMP_NUM_THREADS
    set_launcher "${flags[@]}"
    local command=("${LAUNCHER[@]}" "$ROOT/pretrain_unlearn.py" "${flags[@]}")
    if ((DRY_RUN)); then
        printf '%q ' "${command[@]}"
        printf '\n'
        words_of PLAN
        local plan=("${WORDS[@]}")
        [[ -z ${PEAK_FLOPS:-} ]] || plan+=(--peak-flops "$PEAK_FLOPS")
        exec "$PYTHON" "$ROOT/tools/plan_run.py" --gpus $((NODES * GPUS_PER_NODE)) --gpus-per-node "$GPUS_PER_NODE" \
            --gpu-type "$GPU_TYPE" --mfu "$MFU" "${plan[@]}" -- "${flags[@]}"
    fi
    mkdir -p "$OUT/logs"
    exec "${command[@]}"
}

# set_launcher FLAG...: sets NODES, and LAUNCHER: torchrun on this node, or one torchrun a node by srun inside a Slurm
# job. Outside of one, NODES is only for planning with --dry-run.
set_launcher() {
    LAUNCHER=("$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE")
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        NODES=${NODES:-1}
        need_integers NODES
        ((NODES == 1 || DRY_RUN)) || fail "NODES: more than one node is started by Slurm, found $NODES"
        if ((NODES == 1)); then
            LAUNCHER+=(--standalone)
        else
            LAUNCHER+=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint HOST:29500)
        fi
        return
    fi
    # shellcheck source=../slurm/launcher.sh
    source "$ROOT/examples/slurm/launcher.sh"
    slurm_launcher "$GPUS_PER_NODE" "$@"
}
