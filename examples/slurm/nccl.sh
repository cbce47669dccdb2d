# shellcheck shell=bash
# NCCL's settings for a job. Values and defaults are those of NCCL 2.30 (its source and "Environment Variables" in its
# user guide). Set nothing without a reason: NCCL finds networks and topology by itself, and what is set stays set when
# the next release would choose better. tools/preflight.py says whether the choice is good: bandwidth and slow links.
# What the submitting shell exports wins over this file.

# Warnings and errors go to the ranks' logs; silent otherwise. INFO shows the networks, rings and transports that were
# chosen: for one run when preflight's bandwidth is not what the cluster promises. NCCL_DEBUG_SUBSYS=INIT,NET limits it.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --- Properties of a cluster: set them once for yours if preflight or its administrators say so.
#
# NCCL_SOCKET_IFNAME   Interface for NCCL's first contact, and for data where there is no InfiniBand or RoCE. Default:
#                      the first named ib*, else any but docker*, lo and virbr*. Set it (=eth0; = means exactly this
#                      name) where that one does not reach the other nodes: ranks then hang at their first collective.
# GLOO_SOCKET_IFNAME   The same for torch's gloo, which Megatron uses beside NCCL. Default: where the host's name leads.
# NCCL_IB_HCA          InfiniBand or RoCE adapters for data (=mlx5_0,mlx5_1). Default: all. Set it where some belong to
#                      storage or administration.
# NCCL_IB_GID_INDEX    RoCE only: index of the address. Default -1: found by NCCL.
# NCCL_IB_TC, NCCL_IB_SL   RoCE traffic class, InfiniBand service level, where the fabric keeps one for training.
# NCCL_IB_TIMEOUT      4.096 us x 2^N that a packet's answer may take, N = 20 by default (4.3 s), tried NCCL_IB_RETRY_CNT
#                      = 7 times. 22 lets a run live through links that are down for longer; a dead node is noticed later.
# NCCL_NET, NCCL_NET_PLUGIN   Where the provider's own network (EFA, Slingshot) needs its plugin; its image sets them.
#
# --- Leave these alone.
#
# NCCL_ALGO, NCCL_PROTO, NCCL_MIN_NCHANNELS, NCCL_MAX_NCHANNELS, NCCL_BUFFSIZE, NCCL_NTHREADS
#                      Chosen by size and topology for each call. For experiments.
# NCCL_P2P_DISABLE, NCCL_SHM_DISABLE, NCCL_IB_DISABLE, NCCL_NVLS_ENABLE, NCCL_PXN_DISABLE, NCCL_CROSS_NIC
#                      Each switches a path between GPUs off or forces it. They show which path is broken; kept in a
#                      script they cost bandwidth for ever.
# TORCH_NCCL_BLOCKING_WAIT=1   The host waits for each collective: overlap is lost.
# TORCH_NCCL_ASYNC_ERROR_HANDLING   Default 3: an error or a timeout ends the process, so that torchrun starts it again.
#                      0 leaves it hanging. The timeout is Megatron's --distributed-timeout-minutes, 10.
#
# CUDA_DEVICE_MAX_CONNECTIONS is not NCCL's; pretrain_unlearn.py sets it to 1 unless it is set.
