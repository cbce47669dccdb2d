"""The flags of pretrain_unlearn.py that decide about cost, read without Megatron."""

from __future__ import annotations

import argparse
import dataclasses
from argparse import Namespace
from collections.abc import Sequence

from megatron_ext.config import ChatConfig, UnlearnConfig
from megatron_ext.data.tokenizers import TokenizerSpec, build_reference, tokenizer_digest
from megatron_ext.exceptions import ConfigError, flag_name
from megatron_ext.planning import mixture_flags
from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.checks import check_model, check_run, check_spelling
from megatron_ext.planning.data import DataTokenizer
from megatron_ext.planning.layout import Layout, Recompute, Unlearning
from megatron_ext.stages import check_pipeline

_REQUIRED_SIZES = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads"),
    *("seq-length", "micro-batch-size", "global-batch-size"),
)
_OPTIONAL_SIZES = (
    *("num-query-groups", "kv-channels", "vocab-size", "padded-vocab-size"),
    *("train-iters", "train-samples", "save-interval", "save-retain-interval"),
    *("max-position-embeddings", "lr-decay-iters", "lr-decay-samples"),
    *("lr-wsd-decay-iters", "lr-wsd-decay-samples"),
    *("num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank"),
    *("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"),
    *("ddp-bucket-size", "forget-batch-size", "recompute-num-layers"),
    *mixture_flags.SIZES,
)
_SWITCHES = (
    *("swiglu", "disable-bias-linear", "untie-embeddings-and-output-weights", "bf16", "fp16"),
    *("use-distributed-optimizer", "sequence-parallel", "overlap-grad-reduce"),
    *("overlap-param-gather", "reference-offload", "reference-hidden-offload", "fp32-logits"),
    *("accumulate-allreduce-grads-in-fp32", "grad-reduce-in-bf16", "group-query-attention"),
    *("add-qkv-bias", "qk-layernorm", "use-rotary-position-embeddings", "skip-train"),
    *mixture_flags.SWITCHES,
)
_DEFAULT_SIZES = (
    *("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size"),
    *("make-vocab-size-divisible-by", *mixture_flags.DEFAULT_SIZES),
)
DROPOUTS = ("hidden-dropout", "attention-dropout")
# Flags that change the numbers in ways that this plan does not know.
_NOT_PLANNED = (
    *("rampup-batch-size", "mtp-num-layers", *mixture_flags.NOT_PLANNED),
    *("train-data-path", "forget-train-data-path", "recompute-modules"),
    *("use-precision-aware-optimizer", "optimizer-cpu-offload", "main-grads-dtype"),
    *("use-megatron-fsdp", "use-torch-fsdp2", "num-distributed-optimizer-instances"),
    *("ddp-num-buckets", "ddp-pad-buckets-for-high-nccl-busbw"),
    *("account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split"),
    *("pipeline-model-parallel-layout", "distribute-saved-activations"),
    *("microbatch-group-size-per-virtual-pipeline-stage", "fp8-format", "multi-latent-attention"),
    *("overlap-param-gather-with-optimizer-step", "attention-output-gate", "softmax-type", "spec"),
    *("fp4-format", "cpu-offloading-num-layers", "fine-grained-activation-offloading"),
    *("no-pad-vocab-size", "disable-pad-vocab-size", "window-size", "step-batch-size-schedule"),
    *("data-args-path", "per-split-data-args-path", "heterogeneous-layers-config-path"),
    "tensor-parallel-num-weight-shards",
)
# Of the flags that are passed over, those whose names are like one that is not.
_PASSED_OVER = (
    *("eval-global-batch-size", "eval-micro-batch-size", "reference-load"),
    *("forget-valid-data-path", "forget-test-data-path", "lr-warmup-init"),
    *("lr-wsd-decay-style", "no-position-embedding"),
)


def entry_flags(words: Sequence[str]) -> Namespace:
    """The flags that decide about cost; the others are passed over.

    Raises:
        ConfigError: a size is missing or too small, or a flag is there that this plan does not know, or
            that seems to be mistyped.
    """
    flags, others = _parser().parse_known_args(words)
    check_spelling(others, known=[flag_name(name) for name in vars(flags)])
    for name in _REQUIRED_SIZES:
        if getattr(flags, name.replace("-", "_")) is None:
            raise ConfigError(f"--{name}: expected a size, found none")
    for name in (*_REQUIRED_SIZES, *_OPTIONAL_SIZES, *_DEFAULT_SIZES):
        value = getattr(flags, name.replace("-", "_"))
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: expected at least 1, found {value}")
    for name in _NOT_PLANNED:
        if getattr(flags, name.replace("-", "_")) is not None:
            raise ConfigError(f"--{name} is not supported by the plan")
    check_model(flags)
    check_run(flags)
    return flags


def _parser() -> argparse.ArgumentParser:
    usage = "%(prog)s --gpus N [FLAGS] -- FLAGS of pretrain_unlearn.py"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False, add_help=False)
    for name in (*_REQUIRED_SIZES, *_OPTIONAL_SIZES):
        parser.add_argument(f"--{name}", type=int)
    for name in ("tensor-model", "pipeline-model", "context"):
        parser.add_argument(f"--{name}-parallel-size", type=int, default=1)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument("--recompute-granularity", choices=("selective", "full"), default="none")
    parser.add_argument("--recompute-activations", action="store_true")
    parser.add_argument("--recompute-method", choices=("uniform", "block"), default="uniform")
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--attention-backend")
    for name in ("lr", "lr-warmup-fraction"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--min-lr", type=float, default=0.0)
    parser.add_argument("--lr-decay-style", default="linear")
    for name in ("lr-warmup-iters", "lr-warmup-samples"):
        parser.add_argument(f"--{name}", type=int, default=0)
    for name in DROPOUTS:
        parser.add_argument(f"--{name}", type=float, default=0.1)  # Megatron's
    parser.add_argument("--tokenizer-type", default="SentencePieceTokenizer")
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--data-path", nargs="+")
    parser.add_argument("--dataloader-type", default="single")
    parser.add_argument("--forget-data-path", nargs="+")
    for name in ("forget", "replay", "mitigation"):
        weight = getattr(UnlearnConfig, f"{name}_weight")
        parser.add_argument(f"--{name}-weight", type=float, default=weight)
    for name in ("max-mitigation-kl", "max-replay-increase", "min-forget-probability"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--split", default="969,30,1")  # Megatron's, as is the next
    parser.add_argument("--eval-iters", type=int, default=100)
    parser.add_argument("--chat-data-path", nargs="+")
    parser.add_argument("--chat-epochs", type=int, default=ChatConfig.chat_epochs)
    parser.add_argument("--normalization", default="LayerNorm")  # both are Megatron's
    parser.add_argument("--position-embedding-type", default="learned_absolute")
    mixture_flags.add_flags(parser)
    for name in (*_NOT_PLANNED, *_PASSED_OVER):
        parser.add_argument(f"--{name}", nargs="*")
    return parser


def steps(flags: Namespace) -> int | None:
    """Iterations of the run, if its flags say it; a last part of a batch is not trained on."""
    if flags.train_samples is None:
        return flags.train_iters
    return flags.train_samples // flags.global_batch_size


def tokenizer(flags: Namespace) -> DataTokenizer | None:
    """The tokenizer of these flags, None where none is named."""
    if flags.tokenizer_model is None:
        return None
    spec = TokenizerSpec(tokenizer_type=flags.tokenizer_type, tokenizer_model=flags.tokenizer_model)
    built = build_reference(spec)
    return DataTokenizer(built.vocab_size, built.eod_id, tokenizer_digest(spec))


def architecture(flags: Namespace) -> Architecture:
    """The model of these flags; --vocab-size stands in for a tokenizer that is not there yet.

    Raises:
        ConfigError: there is neither, or both differ (the run would take the tokenizer's), or there are more
            tokens than rows for them.
    """
    vocab_size = flags.vocab_size
    if flags.tokenizer_model is not None:
        spec = TokenizerSpec(
            tokenizer_type=flags.tokenizer_type, tokenizer_model=flags.tokenizer_model
        )
        found = build_reference(spec).vocab_size
        if vocab_size not in (None, found):
            raise ConfigError(
                f"--vocab-size: expected {found}, that of {flags.tokenizer_model}, which the run takes, "
                f"found {vocab_size}"
            )
        vocab_size = found
    if vocab_size is None:
        raise ConfigError("--tokenizer-model or --vocab-size: expected one, found none")
    if (flags.padded_vocab_size or vocab_size) < vocab_size:
        raise ConfigError(
            f"--padded-vocab-size: expected at least the tokenizer's {vocab_size} tokens, found "
            f"{flags.padded_vocab_size}"
        )
    # Megatron wants the switch; its number without one is 1.
    grouped = flags.group_query_attention and (flags.num_query_groups or 1)
    return Architecture(
        layers=flags.num_layers,
        hidden=flags.hidden_size,
        ffn=flags.ffn_hidden_size,
        heads=flags.num_attention_heads,
        query_groups=grouped or flags.num_attention_heads,
        head_size=flags.kv_channels or flags.hidden_size // flags.num_attention_heads,
        vocab_size=vocab_size,
        vocab_multiple=flags.make_vocab_size_divisible_by,
        padded=flags.padded_vocab_size,
        tied=not flags.untie_embeddings_and_output_weights,
        qkv_bias=flags.add_qkv_bias,
        qk_norm=flags.qk_layernorm,
        mixture=mixture_flags.mixture(flags),
    )


def layout(flags: Namespace, *, gpus: int, cpu: bool = False) -> Layout:
    """How these flags spread the run over GPUs.

    Raises:
        ConfigError: layers, tokens, batch or GPUs do not divide.
    """
    pp = flags.pipeline_model_parallel_size
    vpp = flags.num_virtual_stages_per_pipeline_rank or 1
    check_pipeline(flags)
    if each := flags.num_layers_per_virtual_pipeline_stage:
        if flags.num_layers % (pp * each):
            raise ConfigError(
                f"--num-layers: expected a multiple of {pp * each} (PP {pp} x {each} layers of a "
                f"chunk), found {flags.num_layers}"
            )
        vpp = flags.num_layers // (pp * each)
    split = flags.tensor_model_parallel_size * flags.context_parallel_size
    if flags.sequence_parallel and flags.seq_length % split:
        by = f"TP {flags.tensor_model_parallel_size}"
        if flags.context_parallel_size > 1:
            by = f"{split} ({by} x CP {flags.context_parallel_size})"
        raise ConfigError(
            f"--seq-length: expected a multiple of {by}, which --sequence-parallel divides it by, found "
            f"{flags.seq_length}"
        )
    if vpp > 1 and pp == 1:
        raise ConfigError(
            "--pipeline-model-parallel-size: expected more than 1, which the interleaved schedule of "
            f"{vpp} chunks a stage needs, found 1"
        )
    recompute: Recompute = flags.recompute_granularity
    if flags.recompute_activations:
        recompute = "selective"
    return Layout(
        gpus=gpus,
        tp=flags.tensor_model_parallel_size,
        cp=flags.context_parallel_size,
        pp=pp,
        vpp=vpp,
        ep=flags.expert_model_parallel_size,
        first=flags.decoder_first_pipeline_num_layers,
        last=flags.decoder_last_pipeline_num_layers,
        expert_tp=flags.expert_tensor_parallel_size,
        micro_batch=flags.micro_batch_size,
        global_batch=flags.global_batch_size,
        sequence=flags.seq_length,
        # Megatron switches it off where there is one TP rank.
        sequence_parallel=flags.sequence_parallel and flags.tensor_model_parallel_size > 1,
        distributed_optimizer=flags.use_distributed_optimizer,
        half=flags.bf16 or flags.fp16,
        gradient=2 if _half_gradients(flags) else 4,
        recompute=recompute,
        recompute_method=flags.recompute_method,
        recompute_layers=flags.recompute_num_layers or 1,
        overlap_gradients=flags.overlap_grad_reduce,
        overlap_parameters=flags.overlap_param_gather,
        bucket_size=flags.ddp_bucket_size,
        cpu=cpu,
    )


def _half_gradients(flags: Namespace) -> bool:
    """Whether gradients are summed in the type of the weights; bf16's are in fp32 without being asked for."""
    if flags.bf16:
        return bool(flags.grad_reduce_in_bf16)
    return bool(flags.fp16 and not flags.accumulate_allreduce_grads_in_fp32)


def unlearning(flags: Namespace) -> Unlearning | None:
    """What unlearning adds, None for plain training.

    Raises:
        ConfigError: a value that no run could use.
    """
    if not flags.forget_data_path:
        return None
    names = [field.name for field in dataclasses.fields(UnlearnConfig)]
    config = UnlearnConfig(**{name: getattr(flags, name) for name in names if name in flags})
    batch = flags.global_batch_size
    forget = config.forget_samples(batch, train_global_batch_size=batch)
    if not 0 < forget < batch:
        raise ConfigError(
            f"--forget-batch-size: expected at least 1 and fewer than the global batch of {batch} samples, "
            f"found {forget}"
        )
    return Unlearning(
        forget_batch=forget,
        reference=config.needs_reference,
        reference_offload=config.reference_offload,
        hidden_offload=config.reference_hidden_offload,
        fp32_logits=config.fp32_logits,
    )
