"""Flags that a machine cannot serve: it has no CUDA device, or a package is not installed."""

from __future__ import annotations

from megatron_ext.refusals import Refusal

_LOOKED_FOR = (
    "Megatron-Core supports it only for Transformer Engine's layers, which are not installed"
)
WITHOUT_TRANSFORMER_ENGINE = (
    Refusal(
        "use_precision_aware_optimizer",
        "it needs Transformer Engine's optimizer, which is not installed",
    ),
    Refusal(
        "recompute_modules",
        "Megatron-Core recomputes norms only with Transformer Engine, which is not installed",
        "modules without layernorm",
        lambda modules: "layernorm" in modules,
    ),
    Refusal("save_activations_interval", _LOOKED_FOR),
    Refusal("save_dgrads_interval", _LOOKED_FOR),
)
_NO_DEVICE = "there is no CUDA device"
WITHOUT_CUDA: tuple[Refusal, ...] = (
    Refusal("cuda_graph_impl", _NO_DEVICE, "none", lambda kind: kind != "none"),
    Refusal("enable_cuda_graph", _NO_DEVICE),
    Refusal("external_cuda_graph", _NO_DEVICE),
    Refusal("gpu_sniff_test_interval", _NO_DEVICE),
    Refusal("record_memory_history", _NO_DEVICE),
    Refusal("log_straggler", _NO_DEVICE),
    Refusal("optimizer_cuda_graph", _NO_DEVICE),
    Refusal("use_sharp", _NO_DEVICE),
    Refusal(
        "profile",
        "without a CUDA device there is torch's profiler alone, --use-pytorch-profiler",
        beside=("use_pytorch_profiler", False),
    ),
)
WITHOUT_NVML: tuple[Refusal, ...] = (
    Refusal(
        "log_straggler",
        "it reads GPU temperature and power with pynvml, which is not installed (pip install nvidia-ml-py)",
    ),
    Refusal(
        "log_device_memory_used",
        "it is read with pynvml, which is not installed (pip install nvidia-ml-py)",
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
WITHOUT_WANDB = (Refusal("wandb_project", "wandb is not installed"),)
WITHOUT_RESILIENCY = (
    Refusal("enable_ft_package", "NVIDIA's package nvidia-resiliency-ext is not installed"),
)
WITHOUT_STORAGE_CLIENT = (
    Refusal("enable_msc", "NVIDIA's package multi-storage-client is not installed"),
)
_DEEP_EP = (
    "the one of --moe-flex-dispatcher-backend {} is the package deep_ep, which is not installed"
)
WITHOUT_DEEP_EP = tuple(
    Refusal(
        "moe_token_dispatcher_type",
        _DEEP_EP.format(backend),
        "alltoall or allgather",
        lambda kind: kind == "flex",
        beside=("moe_flex_dispatcher_backend", backend),
    )
    for backend in ("deepep", "hybridep")
)
# By the module that is looked for.
WITHOUT_PACKAGE: dict[str, tuple[Refusal, ...]] = {
    "transformer_engine": WITHOUT_TRANSFORMER_ENGINE,
    "pynvml": WITHOUT_NVML,
    "emerging_optimizers": WITHOUT_EMERGING_OPTIMIZERS,
    "wandb": WITHOUT_WANDB,
    "nvidia_resiliency_ext": WITHOUT_RESILIENCY,
    "multistorageclient": WITHOUT_STORAGE_CLIENT,
    "deep_ep": WITHOUT_DEEP_EP,
}
