# shellcheck shell=bash
# What a recipe would start, from its own dry run.

# plan_recipe: sets COMMAND to the words of what RECIPE would start, and CHECKPOINT_BYTES to what one of its checkpoints
# takes; nothing where that is not known, and says why. RECIPE is a recipe of examples/paper and the words behind it, as
# a shell would read them. What the recipe refuses ends the job.
plan_recipe() {
    local recipe said text line
    COMMAND=() CHECKPOINT_BYTES=
    # shellcheck disable=SC2153 # a setting, not a mistyped name
    eval "recipe=($RECIPE)"
    [[ -f ${recipe[0]:-} ]] || {
        echo "RECIPE: expected a recipe, found ${recipe[0]:-nothing}" >&2
        exit 2
    }
    # Another script may not know of dry runs, and start.
    grep -q 'common\.sh' "${recipe[0]}" || {
        echo "preflight: ${recipe[0]} is no recipe of examples/paper, so its plan and its paths are not known"
        return
    }
    said=$(mktemp)
    text=$(DRY_RUN=1 PLAN=--json bash "${recipe[@]}" 2>"$said") || true
    line=$(grep -m 1 'pretrain_unlearn\.py' <<<"$text") || {
        cat "$said" >&2
        exit 2
    }
    eval "COMMAND=($line)" # it is quoted
    CHECKPOINT_BYTES=$(sed -n 's/^ "checkpoint_bytes": \([0-9]*\),$/\1/p' <<<"$text")
    if [[ -z $CHECKPOINT_BYTES ]]; then
        echo "preflight: no plan of ${recipe[0]}, so free space is not compared with a checkpoint: $(tail -n 1 "$said")"
    fi
    rm "$said"
}

# values_of FLAG: prints the values behind the last such flag of COMMAND, one a line.
values_of() {
    local word found='' values=()
    for word in "${COMMAND[@]}"; do
        case $word in
            "$1") found=1 values=() ;;
            "$1"=*) found='' values=("${word#*=}") ;;
            --*) found='' ;;
            *) [[ -z $found ]] || values+=("$word") ;;
        esac
    done
    ((${#values[@]} == 0)) || printf '%s\n' "${values[@]}"
}

# inputs_of_variables: prints what the settings name beside data sets and is there; a checkpoint may be made later.
inputs_of_variables() {
    local name words word
    for name in BASE_LM SYNTH_LM SYNTH_LM_U33B MODEL CHAT_DATA; do
        read -r -d '' -a words <<<"${!name:-}" || true
        for word in "${words[@]}"; do
            if [[ -e $word ]]; then
                echo "$word"
            else
                echo "preflight: $name: nothing at $word yet, so no node looks for it" >&2
            fi
        done
    done
}
