"""Small GPTs of two layer specs on the current ranks, and their loss and gradients.

For functions that run under `run_ranks`: Megatron is imported inside them, once the CPU answers
for CUDA.
"""

from typing import Any

import torch

VOCAB, SEQUENCE, BATCH = 64, 16, 2


def start(tensor_parallel: int = 1, context_parallel: int = 1) -> None:
    """Build Megatron's process groups over the ranks of this test, unless it has them already.

    They are some 20, of three threads each that gloo never ends: built anew for every case of a test,
    their threads would leave no time to the test.
    """
    from megatron_ext.runtime import cpu

    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    found = None
    if parallel_state.is_initialized():
        found = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
        )
    if found != (tensor_parallel, context_parallel):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_parallel, context_parallel_size=context_parallel
        )
    model_parallel_cuda_manual_seed(1)


def config(**changes: Any) -> Any:
    """A Llama-like TransformerConfig, with changes."""
    import torch.nn.functional as F  # noqa: N812 (its usual name)
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
    }
    return TransformerConfig(**(fields | changes))


def gpt(cfg: Any, *, native: bool, seed: int = 0, core_attention: Any = None) -> Any:
    """A GPTModel; every parameter random, so that scales of one and biases of zero hide nothing.

    Megatron's own layers may have another `core_attention`.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_ext.model.layer_spec import torch_native_layer_spec

    stock = get_gpt_layer_local_spec(
        num_experts=cfg.num_moe_experts,
        normalization=cfg.normalization,
        qk_layernorm=cfg.qk_layernorm,
        qk_l2_norm=cfg.qk_l2_norm,
    )
    if core_attention is not None:
        stock.submodules.self_attention.submodules.core_attention = core_attention
    model = GPTModel(
        config=cfg,
        transformer_layer_spec=torch_native_layer_spec(cfg) if native else stock,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm.weight" in name else 0.2 * noise)
    return model


def loss_and_gradients(
    model: Any, wrapped: Any = None, documents: Any = None
) -> tuple[float, dict[str, torch.Tensor]]:
    """One pass through Megatron's own wrapper (given or made), schedule and gradient reduction."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model.config.finalize_model_grads_func = finalize_model_grads
    if wrapped is None:
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=generator)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)

    def forward_step(iterator: Any, chunk: Any) -> Any:
        labels = tokens[:, 1:].contiguous()
        out = chunk(tokens[:, :-1], positions, mask, labels=labels, packed_seq_params=documents)
        return out, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})

    terms = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[wrapped],
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    return float(terms[0]["loss"]), gradients
