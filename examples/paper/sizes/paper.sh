# shellcheck shell=bash disable=SC2034 # common.sh reads these
# The study as published: architecture, token budgets, learning rates and schedules are those of arXiv 2406.12397
# (table 1 and the settings of its models). What the paper does not state is marked "ours".

# Table 1: about 2.1 B parameters with a vocabulary of 125,696.
LAYERS=32
HIDDEN=2048
FFN=5504
HEADS=32
SEQ_LENGTH=4096
VOCAB_DIVISIBLE_BY=128

# Token budgets. FORGET_TOKENS counts forgotten tokens alone; as many are replayed beside them, unless FORGET_BATCH
# is set.
BASE_TOKENS=1000000000000
CONTINUE_TOKENS=300000000000
ABLATION_TOKENS=40000000000
FORGET_TOKENS=1000000000
CHAT_EPOCHS=2

SYNTHETIC_SHARE=0.02
FORGET_WEIGHT=0.01

# Peak learning rates: BaseLM's falls along a cosine, the others are constant.
BASE_LR=1e-4
CONTINUE_LR=5e-5
UNLEARN_LR=5e-5
CHAT_LR=2e-5
# Ours: the end and the warm-up of the cosine.
BASE_MIN_LR=1e-5
BASE_WARMUP_ITERATIONS=2000

# Samples of a step: chat's number is the paper's, but ours are packed with several conversations each (README.md,
# "What is ours"); the others are ours.
LEARN_BATCH=1024
UNLEARN_BATCH=256
CHAT_BATCH=64

# Ours: layout, precision, optimizer, bookkeeping.
: "${GPUS_PER_NODE:=${SLURM_GPUS_ON_NODE:-8}}"
: "${TP:=1}" "${PP:=1}" "${MICRO_BATCH:=4}"
: "${MFU:=0.45}" "${GPU_TYPE:=H100}"
: "${OMP_NUM_THREADS:=8}"
PRECISION=(--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
OPTIMIZER=(--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0)
SPLIT=999,1,0
LEARN_SAVE_INTERVAL=2000
# Chat tuning's as well.
UNLEARN_SAVE_INTERVAL=200
EVALUATION=(--eval-interval 500 --eval-iters 10)
