# shellcheck shell=bash
# How a job starts its ranks: one torchrun a node by srun, in a container or without one.

# slurm_launcher GPUS_PER_NODE WORD...: sets NODES and LAUNCHER; behind it come a script and its words, of which paths
# are refused that a container would not see.
#
# PYTHON               python; in a container the one inside
# CONTAINER_IMAGE      run in this container: a .sqsh file or a registry's image for Pyxis, a .sif file for Apptainer
# CONTAINER_RUNTIME    pyxis (srun's own options) or apptainer
# CONTAINER_MOUNTS     SOURCE:TARGET,...: data, checkpoints and outputs at the same paths as outside; the checkout is
#                      mounted anyway
# MAX_RESTARTS         3: how often torchrun starts all ranks again from the last checkpoint when one has failed
slurm_launcher() {
    NODES=${SLURM_NNODES:-1}
    local here root head runtime=()
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    root=$(cd "$here/../.." && pwd)
    # Not by head, which may end before scontrol has written the names of a thousand nodes, and fail the job so.
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    head=${head%%$'\n'*}
    # The one task of a node is all of its ranks. Slurm takes it for the work of one core, and holds it there where
    # tasks are bound by default (TaskPluginParam).
    LAUNCHER=(srun --nodes "$NODES" --ntasks "$NODES" --ntasks-per-node 1 --kill-on-bad-exit=1 --cpu-bind=none)
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        local mounts=$root:$root${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS} IMAGE
        # shellcheck source=../slurm/container.sh
        source "$here/container.sh"
        case ${CONTAINER_RUNTIME:-pyxis} in
            pyxis)
                container_image
                LAUNCHER+=(--container-image "$IMAGE" --container-mounts "$mounts"
                    --container-workdir "$root" --no-container-mount-home)
                ;;
            apptainer)
                container_image
                # --nv brings the driver's libraries in; without a GPU it warns and goes on.
                runtime=(apptainer exec --nv --bind "$mounts" --pwd "$root" "$IMAGE")
                ;;
            *)
                echo "CONTAINER_RUNTIME: expected pyxis or apptainer, found $CONTAINER_RUNTIME" >&2
                exit 2
                ;;
        esac
        check_mounted "$mounts" "${@:2}"
    fi
    # A restart loses no place in the queue. Jobs that share a node must not meet: the port follows from the job's
    # number, below 32768, where Linux begins to give ports to connections.
    # node.sh adds what differs between nodes.
    LAUNCHER+=("${runtime[@]}" bash "$here/node.sh" "$PYTHON" -m torch.distributed.run
        --nnodes "$NODES" --nproc-per-node "$1"
        --max-restarts "${MAX_RESTARTS:-3}"
        --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d
        --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 12768))"
        --redirects 3 --tee 3)
}
