# shellcheck shell=bash
# What a job does around its recipe; job scripts source this file from the root of the checkout.

# shellcheck source=../slurm/nccl.sh
source examples/slurm/nccl.sh

# run_recipe RECIPE WORD...: runs it until it ends, and has Slurm start the job again if it has more to do:
#
# - when it was preempted with a grace time: only the ranks are told, and they end before Slurm would requeue the job;
# - when it failed, or came near its time limit, after it had saved a newer checkpoint than it began with. Without
#   one the next start would end as this one did, and a job that gets nowhere would hold its nodes for ever. A
#   checkpoint that another job has saved there does not count.
#
# Shortly before the limit (#SBATCH --signal=B:USR1@SECONDS tells this shell alone) the ranks save and end.
#
# After preemption without a grace time and the loss of a node Slurm itself starts the job again (#SBATCH --requeue).
# PREFLIGHT=1 checks the nodes at each start; a failure ends the job.
run_recipe() {
    [[ -f ${1:-} ]] || {
        echo "${SLURM_JOB_NAME:-job}: error: expected a recipe, found ${1:-nothing}" >&2
        exit 2
    }
    if [[ ${PREFLIGHT:-0} != 0 ]]; then
        RECIPE=$(printf '%q ' "$@") bash examples/slurm/preflight.sbatch
    fi
    local recipe before code=0 again=1 ended
    before=$(saved)
    ENDED=0
    # To the job's steps, not to this shell: SIGTERM has the ranks save.
    trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
    # From Slurm to all processes of the job: it was cancelled, preempted or is out of time. Slurm decides what follows.
    trap 'again=1; ENDED=1' TERM
    ended=$(mktemp)
    # What it ended with is written down: bash 5.2 may lose it when a signal comes at the same time.
    {
        trap : TERM USR1
        bash "$@" && code=0 || code=$?
        echo "$code" >"$ended"
    } &
    recipe=$!
    while ((again)); do # a signal ends a wait before its time
        again=0
        wait "$recipe" || true
    done
    code=$(<"$ended")
    code=${code:-1}
    rm "$ended"
    if ((code != 0 && !ENDED)); then
        local states
        states="exit code $code; checkpoints: ${before:-none} before, $(saved | grep . || echo none) now"
        if [[ -e ${OUT:-}/ended_for_another_run.$SLURM_JOB_ID ]]; then
            echo "$states; the job is not requeued, for another one saves in $OUT"
        elif preempted || [[ $(saved) != "$before" ]]; then
            echo "$states; the job is requeued"
            scontrol requeue "$SLURM_JOB_ID"
        elif ((code != 2)); then # a setting that was refused has its own line
            echo "$states; the job is not requeued, for it would end in the same way"
        fi
    fi
    exit "$code"
}

# The iteration of the latest checkpoint; nothing without one.
saved() {
    cat "${OUT:-}/latest_checkpointed_iteration.txt" 2>/dev/null || true
}

# Whether Slurm has told the job to make room; it forgets when the job starts again.
preempted() {
    scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'
}
