# shellcheck shell=bash
# What is refused before srun starts a container: an image that is not there, and paths that it would not see.

# container_image: sets IMAGE, an absolute path if it is one. Pyxis takes for a path what begins with / or a dot,
# Apptainer all that is no URI.
container_image() {
    IMAGE=$CONTAINER_IMAGE
    case ${CONTAINER_RUNTIME:-pyxis}:$IMAGE in
        *://*) return ;;
        apptainer:* | pyxis:[./]* | *.sqsh | *.sif) IMAGE=$(realpath -ms "$IMAGE") ;;
        *) return ;;
    esac
    [[ -e $IMAGE ]] || {
        echo "CONTAINER_IMAGE: expected an image, found nothing at $IMAGE" >&2
        exit 2
    }
}

# check_mounted MOUNTS WORD...: refuses paths among the words of a command that the container would not see.
check_mounted() {
    local mounts=$1 word flag='' real
    shift
    for word; do
        [[ $word != --* ]] || flag=${word%%=*}
        [[ $word != --*=* ]] || word=${word#*=}
        # A file, a data set's prefix, or what may still have to be made; the rest are numbers and names.
        [[ $word == /* || -e $word || -e $word.idx ]] || continue
        sees "$mounts" "$word" || {
            [[ $real == "$(realpath -ms "$word")" ]] || word+=", which leads to $real"
            echo "$(variable_of "$word" "$flag"): expected a path that the container sees, below the checkout or a" \
                "target of CONTAINER_MOUNTS, found $word" >&2
            exit 2
        }
    done
}

# sees MOUNTS PATH: sets `real` to where it leads if the container does not see it: to nowhere by a link, or at all.
sees() {
    local all path place source target
    IFS=, read -r -a all <<<"$1"
    path=$(realpath -ms "$2")
    real=$path
    for place in "${all[@]}"; do
        IFS=: read -r source target _ <<<"$place"
        target=$(realpath -ms "${target:-$source}")
        below "$path" "$target" || continue
        real=$(realpath -m "$source/${path#"$target"}")
        ! below "$real" "$(realpath -m "$source")" || return 0
    done
    [[ $real != "$path" ]] || return 1
    for place in "${all[@]}"; do
        IFS=: read -r source target _ <<<"$place"
        ! below "$real" "$(realpath -ms "${target:-$source}")" || return 0
    done
    return 1
}

# below PATH FOLDER
below() {
    [[ $1 == "$2" || $1 == "${2%/}"/* ]]
}

# variable_of WORD FLAG: the setting that holds the word, or else the flag before it.
variable_of() {
    local name words
    for name in OUT TOKENIZER DATA_CACHE REAL SYNTHETIC U33B CHAT_DATA BASE_LM SYNTH_LM SYNTH_LM_U33B MODEL; do
        read -r -d '' -a words <<<"${!name:-}" || true
        [[ " ${words[*]} " != *" ${1%%, which leads to *} "* ]] || {
            echo "$name"
            return
        }
    done
    echo "$2"
}
