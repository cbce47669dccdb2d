"""The flags and combinations of flags that are refused, with the reason; docs/refused.md lists them.

Those of chat tuning are in chat_refusals.py, those of what a machine lacks in machine_refusals.py.

A row is checked against the parsed arguments before Megatron validates them, so that nothing has started yet.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import ConfigError, flag_name


@dataclass(frozen=True)
class Refusal:
    """A flag that cannot be used.

    Attributes:
        name: the argument.
        reason: why not.
        expected: what it must be; where it may not be used at all, nothing.
        is_refused: whether a value is.
        beside: another argument, and its value with which this one cannot be used (False: where that flag
            is left out); by default any.
    """

    name: str
    reason: str
    expected: str = ""
    is_refused: Callable[[Any], Any] = bool
    beside: tuple[str, str | bool] | None = None

    @property
    def flag(self) -> str:
        """As it is typed."""
        return flag_name(self.name)


def is_no_single(loader: str) -> bool:
    """Whether a ``--dataloader-type`` reads samples in another order than that of their indices."""
    return loader != "single"


def _differs_from(default: object) -> Callable[[Any], bool]:
    return lambda value: value != default


_ONLY_LAYERS = "only Transformer layers (attention and MLP or experts) are supported"
# These make another model of the same weights, or weights that no model here has.
OF_THE_MODEL: tuple[Refusal, ...] = (
    Refusal("multi_latent_attention", "multi-latent attention is not implemented here"),
    Refusal("use_mup", "the fused head does not scale logits by width"),
    Refusal("is_hybrid_model", _ONLY_LAYERS),
    Refusal("hybrid_layer_pattern", _ONLY_LAYERS),
    Refusal("hybrid_override_pattern", _ONLY_LAYERS),
    Refusal("linear_attention_freq", "linear attention is not implemented here"),
)
_NO_FSDP = (
    "FSDP is not supported; use tensor and pipeline parallelism and --use-distributed-optimizer"
)
_AT_RANDOM = "tokens would be routed at random (it is a benchmark setting)"
_SHARDED = "weights are sharded by tensor parallelism only"
_ONE_KIND = (
    "a run resumes only from ordinary checkpoints; to keep fewer of them use --save-retain-interval"
)
NEVER: tuple[Refusal, ...] = (
    *OF_THE_MODEL,
    Refusal("yaml_cfg", "settings are given as flags only"),
    Refusal("use_torch_fsdp2", _NO_FSDP),
    Refusal("use_megatron_fsdp", _NO_FSDP),
    Refusal("fim_data", "fill-in-the-middle samples are not implemented here"),
    Refusal("sft", "use --chat-data-path for chat tuning"),
    Refusal(
        "mtp_num_layers",
        "the fused head has no loss for multi-token prediction, with --forget-data-path or without",
    ),
    Refusal(
        "reset_attention_mask",
        "no mask is built; --dataloader-inter-document-masking keeps attention within documents",
    ),
    Refusal(
        "overlap_moe_expert_parallel_comm",
        "it replaces the pipeline schedule that this program wraps",
    ),
    Refusal("moe_use_upcycling", "a checkpoint can only be resumed with its own architecture"),
    Refusal("moe_router_force_load_balancing", _AT_RANDOM),
    Refusal("moe_router_force_biased", _AT_RANDOM),
    Refusal("hybrid_context_parallel", "every sample is split over the same number of ranks"),
    Refusal(
        "defer_embedding_wgrad_compute",
        "the fused head computes the gradient of the output layer itself",
    ),
    Refusal("use_cpu_initialization", "Megatron-Core would leave such a model on the CPU"),
    Refusal("perform_rl_step", "reinforcement learning is not implemented here"),
    Refusal("fake_process_group", "ranks would not communicate, so nothing would be trained"),
    # Megatron-Core 0.19.2 fails with these, or ends without a step.
    Refusal("adlr_autoresume", "it needs NVIDIA's internal job scheduler"),
    Refusal("init_method_xavier_uniform", "Megatron-Core 0.19.2 fails with it"),
    Refusal("init_model_with_meta_device", "Megatron-Core would leave the weights uninitialised"),
    Refusal(
        "rerun_mode",
        "Megatron-Core's parser offers this value, but its code does not know it",
        "disabled or validate_results",
        lambda mode: mode == "report_stats",
    ),
    Refusal("lazy_mpu_init", "process groups are needed from the start"),
    Refusal("full_validation", "Megatron-Core 0.19.2 fails with it at the first validation"),
    Refusal("multiple_validation_sets", "it needs --full-validation"),
    Refusal(
        "dataloader_type",
        "external iterators are not supported",
        "single or cyclic",
        lambda loader: loader == "external",
    ),
    # These eight do nothing here, or only in Megatron-LM's pretrain_gpt.py; that must not go unsaid.
    Refusal(
        "rampup_batch_size",
        "Megatron-Core ignores it; plain training can use --step-batch-size-schedule",
    ),
    Refusal("openai_gelu", "Megatron-Core ignores it"),
    Refusal("apply_residual_connection_post_layernorm", "Megatron-Core ignores it"),
    Refusal("freeze_all_layers", "Megatron-Core would train the layers all the same"),
    Refusal("check_for_spiky_loss", "only NaN and inf are checked for here"),
    Refusal("config_logger_dir", "Megatron-Core 0.19.2 fails to write process groups there"),
    Refusal("use_ring_exchange_p2p", "torch has no such operation"),
    Refusal(
        "dist_ckpt_strictness",
        "Megatron-Core cannot load what comes back then",
        "assume_ok_unexpected, log_unexpected, log_all, raise_unexpected, raise_all or ignore_all",
        lambda value: str(value).startswith("return_"),
    ),
    Refusal("inprocess_restart", "torchrun or the cluster's job restarts a failed run"),
    Refusal("logits_save_dir", "the fused head never holds the logits of all tokens"),
    Refusal("logits_load_dir", "distillation from saved logits is not implemented here"),
    Refusal(
        "ckpt_format",
        "a run resumes from this format only",
        "torch_dist",
        lambda name: name != "torch_dist",
    ),
    Refusal(
        "override_ckpt_iteration",
        "the learning rate schedule would not go back with the weights; to go back to iteration N, write "
        "N into latest_checkpointed_iteration.txt",
    ),
    Refusal("non_persistent_save_interval", _ONE_KIND),
    Refusal("non_persistent_ckpt_type", _ONE_KIND),
    Refusal("tensor_parallel_num_weight_shards", _SHARDED),
    Refusal("expert_tensor_parallel_num_weight_shards", _SHARDED),
)
_GATHERED = "torch-native attention always all-gathers keys and values over context-parallel ranks"
WITH_TORCH_NATIVE_LAYERS = (
    Refusal(
        "attention_backend",
        "the torch-native layers do not use Megatron-Core's own attention",
        "auto, flash, fused or unfused",
        lambda backend: backend.name == "local",
    ),
    Refusal(
        "cp_comm_type",
        _GATHERED,
        "all_gather (or p2p, Megatron's default, which is then ignored)",
        lambda kinds: not {*kinds} <= {"p2p", "all_gather"},
    ),
    Refusal("hierarchical_context_parallel_sizes", _GATHERED),
)
WITH_LAYERS_OF_SPEC = (
    Refusal(
        "dataloader_inter_document_masking",
        "whether the layers of --spec attend within documents is not known",
    ),
)
_LENGTHS_DIFFER = (
    "a graph is of fixed lengths, documents (--dataloader-inter-document-masking) are not"
)
_WITHIN = ("dataloader_inter_document_masking", True)
WITH_DOCUMENTS = (
    Refusal(
        "attention_backend",
        "Megatron-Core's own attention is across documents (--dataloader-inter-document-masking)",
        "auto, flash, fused or unfused",
        lambda backend: backend.name == "local",
        beside=_WITHIN,
    ),
    Refusal(
        "cuda_graph_impl", _LENGTHS_DIFFER, "none", lambda kind: kind != "none", beside=_WITHIN
    ),
    Refusal("enable_cuda_graph", _LENGTHS_DIFFER, beside=_WITHIN),
    Refusal("external_cuda_graph", _LENGTHS_DIFFER, beside=_WITHIN),
)
_NATIVE_THEN = (
    "documents are attended to by torch-native attention there, which does not compute this"
)
# With Transformer Engine's layers under context parallelism.
WITH_DOCUMENTS_OVER_RANKS = (
    *WITH_TORCH_NATIVE_LAYERS[1:],
    Refusal("window_size", _NATIVE_THEN),
    Refusal("softmax_type", _NATIVE_THEN, "vanilla", lambda kind: kind != "vanilla"),
    Refusal("qk_clip", _NATIVE_THEN),
    Refusal("log_max_attention_logit", _NATIVE_THEN),
    Refusal("batch_invariant_mode", _NATIVE_THEN),
)
WITH_DISTRIBUTED_OPTIMIZER = (
    Refusal(
        "optimizer",
        "Megatron-Core lays out the parameters for the distributed optimizer with Adam only",
        "adam",
        lambda name: name != "adam",
    ),
)
WITH_DATASET_LOG: tuple[Refusal, ...] = (
    Refusal("mock_data", "random tokens are of no dataset"),
    Refusal("chat_data_path", "conversations are of no dataset"),
    Refusal(
        "cuda_graph_impl",
        "a graph of a full iteration does not see which datasets its samples are from",
        "none, local or transformer_engine",
        lambda kind: kind == "full_iteration",
    ),
)
_COMPOSED = "the number of forgotten and replayed samples per batch is fixed for the whole run"
_BY_OTHERS = "a token's experts would depend on the other tokens of its microbatch"
WITH_UNLEARNING: tuple[Refusal, ...] = (
    Refusal("step_batch_size_schedule", _COMPOSED),
    Refusal("decrease_batch_size_if_needed", _COMPOSED),
    Refusal("phase_transition_iterations", _COMPOSED),
    Refusal(
        "calculate_per_token_loss",
        "each term of the objective is already a mean over its tokens of the global batch",
    ),
    Refusal(
        "log_validation_ppl_to_tensorboard",
        "perplexities are logged as they are, and those of Megatron-Core are of its losses only",
    ),
    Refusal("moe_expert_capacity_factor", _BY_OTHERS),
    # The backend ncclep needs it, and ends the run where it is exceeded.
    Refusal(
        "moe_expert_rank_capacity_factor",
        f"tokens beyond it are dropped, so that {_BY_OTHERS}",
        beside=("moe_flex_dispatcher_backend", "hybridep"),
    ),
    Refusal(
        "moe_router_load_balancing_type",
        f"{_BY_OTHERS}, and the reference would route by another rule",
        "aux_loss, seq_aux_loss, global_aux_loss, quantile_balancing or none",
        lambda kinds: "sinkhorn" in kinds,
    ),
    Refusal("mock_data", "mock data are random tokens, with nothing to forget"),
    Refusal(
        "dataloader_type",
        "the order of forgotten and replayed samples is fixed, so that a run can resume",
        "single",
        is_no_single,
    ),
    Refusal(
        "cuda_graph_impl",
        "a graph of a full iteration cannot contain the reference's forward pass",
        "none, local or transformer_engine",
        lambda kind: kind == "full_iteration",
    ),
)
# Every flag of unlearning, but those that name the text, which is what turns unlearning on.
WITHOUT_UNLEARNING = tuple(
    Refusal(field.name, "it only affects unlearning", is_refused=_differs_from(field.default))
    for field in fields(UnlearnConfig)
    if not field.name.endswith("data_path")
)


def refuse(args: Namespace, refusals: Iterable[Refusal], *, where: str) -> None:
    """Hold parsed arguments against a table.

    Args:
        args: the arguments; one that is not among them is not refused.
        refusals: the rows.
        where: completes "--flag ...": under which circumstance the rows hold.

    Raises:
        ConfigError: names the flag and the reason of the first row that applies.
    """
    for row in refusals:
        value = getattr(args, row.name, None)
        if value is None or not row.is_refused(value):
            continue
        if row.beside is not None and getattr(args, row.beside[0], None) != row.beside[1]:
            continue
        if row.expected:
            found = getattr(value, "name", value)  # an enum's, as it is typed
            raise ConfigError(f"{row.flag}: expected {row.expected}, found {found}; {row.reason}")
        raise ConfigError(f"{row.flag} {where}: {row.reason}")
