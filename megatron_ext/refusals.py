"""Every flag and combination of flags that is refused, with the reason; docs/refused.md lists them.

A row is checked against the parsed arguments before Megatron validates them, so that nothing has started yet.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from megatron_ext.config import UnlearnConfig
from megatron_ext.exceptions import ConfigError


@dataclass(frozen=True)
class Refusal:
    """A flag that cannot be used.

    Attributes:
        name: the argument.
        reason: why not.
        expected: what it must be; where it may not be used at all, nothing.
        is_refused: whether a value is.
    """

    name: str
    reason: str
    expected: str = ""
    is_refused: Callable[[Any], Any] = bool

    @property
    def flag(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"


def _is_no_single(loader: str) -> bool:
    return loader != "single"


def _differs_from(default: object) -> Callable[[Any], bool]:
    return lambda value: value != default


# These make another model of the same weights, or weights that no model here has.
OF_THE_MODEL: tuple[Refusal, ...] = (
    Refusal(
        "multi_latent_attention", "multi-latent attention is not among the layers of this product"
    ),
    Refusal("use_mup", "the head does not scale logits by width"),
    Refusal("is_hybrid_model", "every layer here is attention and a feed-forward part"),
    Refusal("hybrid_layer_pattern", "every layer here is attention and a feed-forward part"),
    Refusal("hybrid_override_pattern", "every layer here is attention and a feed-forward part"),
    Refusal("linear_attention_freq", "linear attention is not among the layers of this product"),
)
_ONE_KIND = (
    "a run goes on from complete checkpoints alone; --save-retain-interval deletes older ones"
)
NEVER: tuple[Refusal, ...] = (
    *OF_THE_MODEL,
    Refusal("yaml_cfg", "settings are given as flags"),
    Refusal("use_torch_fsdp2", "the model is sharded by tensor and pipeline parallelism"),
    Refusal("use_megatron_fsdp", "the model is sharded by tensor and pipeline parallelism"),
    Refusal("fim_data", "fill-in-the-middle samples are not built here"),
    Refusal("sft", "conversations are named by --chat-data-path"),
    Refusal(
        "mtp_num_layers",
        "the head has no loss for further predictions, with --forget-data-path or without",
    ),
    Refusal("reset_attention_mask", "attention is causal over the whole sample"),
    Refusal("dataloader_inter_document_masking", "attention is causal over the whole sample"),
    Refusal(
        "overlap_moe_expert_parallel_comm", "it replaces the schedule that runs the steps here"
    ),
    Refusal("moe_use_upcycling", "a model goes on from a checkpoint of its own architecture"),
    Refusal("moe_router_force_load_balancing", "tokens would go to experts at random"),
    Refusal("moe_router_force_biased", "tokens would go to experts at random"),
    Refusal("hybrid_context_parallel", "every sample is split over as many ranks"),
    Refusal(
        "defer_embedding_wgrad_compute", "the head computes the output layer's gradient itself"
    ),
    Refusal("use_cpu_initialization", "Megatron-Core leaves such a model off the GPU"),
    Refusal("perform_rl_step", "rewards are not among the losses of this product"),
    Refusal("fake_process_group", "ranks that hear nothing of each other train nothing together"),
    # Megatron-Core 0.19.2 fails with these, or ends without a step.
    Refusal("adlr_autoresume", "it needs the scheduler of a cluster of NVIDIA's own"),
    Refusal(
        "init_method_xavier_uniform", "Megatron-Core hands it to a config that does not take it"
    ),
    Refusal(
        "init_model_with_meta_device", "Megatron-Core leaves the weights of such a model unset"
    ),
    Refusal(
        "rerun_mode",
        "Megatron-Core does not know the other one that its own parser offers",
        "disabled or validate_results",
        lambda mode: mode == "report_stats",
    ),
    Refusal("lazy_mpu_init", "the groups of ranks are needed from the start"),
    Refusal("full_validation", "Megatron-Core fails with it at the first validation"),
    Refusal("multiple_validation_sets", "it needs --full-validation"),
    Refusal(
        "dataloader_type",
        "the data sets are no iterators",
        "single or cyclic",
        lambda loader: loader == "external",
    ),
    # These eight do nothing here, or only in Megatron-LM's pretrain_gpt.py; that must not go unsaid.
    Refusal(
        "rampup_batch_size",
        "Megatron-Core does not read it any more; --step-batch-size-schedule is for plain runs",
    ),
    Refusal("openai_gelu", "Megatron-Core does not read it any more"),
    Refusal("apply_residual_connection_post_layernorm", "Megatron-Core does not read it any more"),
    Refusal("freeze_all_layers", "the layers would be trained all the same"),
    Refusal("check_for_spiky_loss", "losses are checked for NaN and inf alone"),
    Refusal("inprocess_restart", "a run that fails is started again by torchrun or its job"),
    Refusal("logits_save_dir", "the head never holds the logits of all tokens"),
    Refusal("logits_load_dir", "the loss of distillation is not computed here"),
    Refusal(
        "ckpt_format",
        "a run goes on only from such a checkpoint",
        "torch_dist",
        lambda name: name != "torch_dist",
    ),
    Refusal(
        "override_ckpt_iteration",
        "the learning rate's schedule would not go back with it; a run goes back to iteration N, once, if "
        "latest_checkpointed_iteration.txt says N",
    ),
    Refusal("non_persistent_save_interval", _ONE_KIND),
    Refusal("non_persistent_ckpt_type", _ONE_KIND),
    Refusal("tensor_parallel_num_weight_shards", "weights are sharded by tensor parallelism alone"),
)
_LOOKED_FOR = "Megatron-Core looks for layers of Transformer Engine, which is not installed"
WITHOUT_TRANSFORMER_ENGINE = (
    Refusal(
        "use_precision_aware_optimizer",
        "its optimizer comes with Transformer Engine, which is not installed",
    ),
    Refusal(
        "recompute_modules",
        "Megatron-Core makes norms again only with Transformer Engine, which is not installed",
        "modules without layernorm",
        lambda modules: "layernorm" in modules,
    ),
    Refusal("save_activations_interval", _LOOKED_FOR),
    Refusal("save_dgrads_interval", _LOOKED_FOR),
)
WITH_TORCH_NATIVE_LAYERS = (
    Refusal(
        "attention_backend",
        "Megatron-Core's own attention is not among these layers",
        "auto, flash, fused or unfused",
        lambda backend: backend.name == "local",
    ),
    Refusal(
        "cp_comm_type",
        "context-parallel ranks gather keys and values here",
        "all_gather (or p2p, Megatron's default, which is then not used)",
        lambda kinds: not {*kinds} <= {"p2p", "all_gather"},
    ),
    Refusal(
        "hierarchical_context_parallel_sizes", "context-parallel ranks gather keys and values here"
    ),
)
WITH_DISTRIBUTED_OPTIMIZER = (
    Refusal(
        "optimizer",
        "Megatron-Core's builders of models do not lay out the parameters for the others",
        "adam",
        lambda name: name != "adam",
    ),
)
_NO_DEVICE = "there is no CUDA device"
WITHOUT_CUDA: tuple[Refusal, ...] = (
    Refusal("cuda_graph_impl", _NO_DEVICE, "none", lambda kind: kind != "none"),
    Refusal("enable_cuda_graph", _NO_DEVICE),
    Refusal("external_cuda_graph", _NO_DEVICE),
    Refusal("gpu_sniff_test_interval", _NO_DEVICE),
    Refusal("record_memory_history", _NO_DEVICE),
    Refusal("log_straggler", _NO_DEVICE),
)
WITHOUT_NVML: tuple[Refusal, ...] = (
    Refusal(
        "log_straggler",
        "temperature and power of a GPU are read with pynvml (pip install nvidia-ml-py), which is not there",
    ),
)
WITHOUT_EMERGING_OPTIMIZERS = (
    Refusal(
        "optimizer",
        "the others come with NVIDIA's package emerging-optimizers, which is not installed",
        "adam or sgd",
        lambda name: name not in ("adam", "sgd"),
    ),
)
# By the module that is looked for.
WITHOUT_PACKAGE = {
    "transformer_engine": WITHOUT_TRANSFORMER_ENGINE,
    "pynvml": WITHOUT_NVML,
    "emerging_optimizers": WITHOUT_EMERGING_OPTIMIZERS,
}
_COMPOSED = "the composition of a batch is fixed for the whole run"
_BY_OTHERS = "what a token gets would depend on the others of its microbatch"
WITH_UNLEARNING: tuple[Refusal, ...] = (
    Refusal("step_batch_size_schedule", _COMPOSED),
    Refusal("decrease_batch_size_if_needed", _COMPOSED),
    Refusal("phase_transition_iterations", _COMPOSED),
    Refusal(
        "calculate_per_token_loss",
        "each term is already averaged over its tokens of the global batch",
    ),
    Refusal("moe_expert_capacity_factor", _BY_OTHERS),
    Refusal(
        "moe_router_load_balancing_type",
        f"{_BY_OTHERS}, and the reference would route it by another rule",
        "aux_loss, seq_aux_loss, global_aux_loss, quantile_balancing or none",
        lambda kinds: "sinkhorn" in kinds,
    ),
    Refusal("mock_data", "there is nothing to forget in random tokens"),
    Refusal(
        "dataloader_type",
        "the order of forgotten and replayed samples is fixed",
        "single",
        _is_no_single,
    ),
    Refusal(
        "cuda_graph_impl",
        "a graph of a full iteration cannot capture the reference's pass",
        "none, local or transformer_engine",
        lambda kind: kind == "full_iteration",
    ),
)
# Every flag of unlearning, but those that name the text, which is what turns unlearning on.
WITHOUT_UNLEARNING = tuple(
    Refusal(field.name, "nothing is unlearned", is_refused=_differs_from(field.default))
    for field in fields(UnlearnConfig)
    if not field.name.endswith("data_path")
)

_ONE_OF_TWO = "a run either unlearns or tunes; unlearn first, then tune the result"
_OTHER_DATA = "the conversations are the data"
_EVERY_TOKEN = "the template decides which tokens count"
_PACKED = "positions and attention run on over a packed sequence"
_FIXED = "the number of iterations follows from a fixed global batch"
WITH_CHAT: tuple[Refusal, ...] = (
    Refusal("forget_data_path", _ONE_OF_TWO),
    Refusal("forget_train_data_path", _ONE_OF_TWO),
    Refusal("forget_valid_data_path", _ONE_OF_TWO),
    Refusal("forget_test_data_path", _ONE_OF_TWO),
    Refusal("data_path", _OTHER_DATA),
    Refusal("data_args_path", _OTHER_DATA),
    Refusal("per_split_data_args_path", _OTHER_DATA),
    Refusal("train_data_path", _OTHER_DATA),
    Refusal("valid_data_path", _OTHER_DATA),
    Refusal("test_data_path", _OTHER_DATA),
    Refusal("mock_data", _OTHER_DATA),
    Refusal("eod_mask_loss", _EVERY_TOKEN),
    Refusal("reset_position_ids", _PACKED),
    Refusal("step_batch_size_schedule", _FIXED),
    Refusal("decrease_batch_size_if_needed", _FIXED),
    Refusal("phase_transition_iterations", _FIXED),
    Refusal(
        "ddp_average_in_collective", "gradients are summed and then divided by the counted tokens"
    ),
    Refusal(
        "dataloader_type",
        "the order of the conversations is a function of --seed and the epoch",
        "single",
        _is_no_single,
    ),
)
REQUIRED_WITH_CHAT = ("seq_length", "global_batch_size", "tokenizer_type", "tokenizer_model")


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
        if row.expected:
            found = getattr(value, "name", value)  # an enum's, as it is typed
            raise ConfigError(f"{row.flag}: expected {row.expected}, found {found}; {row.reason}")
        raise ConfigError(f"{row.flag} {where}: {row.reason}")
