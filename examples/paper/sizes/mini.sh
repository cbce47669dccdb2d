# shellcheck shell=bash disable=SC2034 # common.sh reads these
# The study in miniature: 3.3 M parameters, the model of examples/demo/stages.py, on two CPU ranks.
# A model this small needs higher rates, more synthetic text and a stronger forgetting weight than the paper's
# to change within so few steps; the recipes are the same.

LAYERS=4
HIDDEN=192
FFN=512
HEADS=6
SEQ_LENGTH=256
VOCAB_DIVISIBLE_BY=64

# 450, 200, 100 and 50 steps of 16 samples; half of an unlearning step is forgotten.
BASE_TOKENS=1843200
CONTINUE_TOKENS=819200
ABLATION_TOKENS=409600
FORGET_TOKENS=102400
CHAT_EPOCHS=2

SYNTHETIC_SHARE=0.3
FORGET_WEIGHT=0.1

BASE_LR=3e-3
CONTINUE_LR=1e-3
UNLEARN_LR=5e-4
CHAT_LR=5e-4
BASE_MIN_LR=3e-4
BASE_WARMUP_ITERATIONS=22

LEARN_BATCH=16
UNLEARN_BATCH=16
CHAT_BATCH=16

: "${GPUS_PER_NODE:=2}"
: "${TP:=1}" "${PP:=1}" "${MICRO_BATCH:=4}"
: "${MFU:=0.45}" "${GPU_TYPE:=CPU}" "${PEAK_FLOPS:=100e9}"
: "${OMP_NUM_THREADS:=1}"
PRECISION=()
OPTIMIZER=(--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0)
SPLIT=1,0,0
LEARN_SAVE_INTERVAL=150
UNLEARN_SAVE_INTERVAL=150
EVALUATION=(--eval-iters 0)
