#!/usr/bin/env bash
# Started by srun once on each node: gives torchrun what differs between nodes, as variables (PET_*) in place of its
# flags, and becomes it.
set -euo pipefail

# logs/JOB.REQUEUES/NODE/RENDEZVOUS/attempt_RESTARTS/LOCAL_RANK/std{out,err}.log
export PET_LOG_DIR=$OUT/logs/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}/$SLURMD_NODENAME
mkdir -p "$PET_LOG_DIR"

# The name that the other nodes know; torchrun's own guess asks the resolver. Ranks follow the order of these names.
export PET_LOCAL_ADDR=$SLURMD_NODENAME

# The first node keeps the rendezvous; torchrun's own guess compares names, and waits in vain where the endpoint is an
# alias. Seconds: read_timeout is also how long a node waits for the first one to be up (a container's image may have
# to be fetched), join_timeout how long all wait for the last one, at the start and after a failure.
host=false
[[ $SLURM_NODEID != 0 ]] || host=true
export PET_RDZV_CONF=is_host=$host,join_timeout=900,read_timeout=600

# Ranks that start again must meet in a store of their own. In the one that torchrun (2.13) keeps for them they find
# the addresses of the ranks before them, and connect to nobody.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# torchrun's 30 s between SIGTERM and SIGKILL would end the ranks in the middle of their save. Not by its flag, which
# torch 2.11 refuses; it passes over the variable.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}

# The last collectives of each rank, written when one of them has timed out; torch's own default is the node's /tmp.
# Megatron prefers the variable to its flag.
if [[ " $* " != *" --flight-recorder-dump-path"[\ =]* ]]; then
    export TORCH_FR_DUMP_TEMP_FILE=${TORCH_FR_DUMP_TEMP_FILE:-$PET_LOG_DIR/nccl_trace_rank_}
fi

# The ranks answer this signal with the stacks of their threads, in stderr.log. torchrun would die of it.
trap '' USR2

exec "$@"
