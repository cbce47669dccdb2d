"""Cases for the plan's activations, and as a script what steps of them really allocate, on two ranks.

The product's own layers and head under Megatron's schedules. Storages that are alive are counted; no
formula of the plan is asked.
"""

import json
from dataclasses import replace
from typing import Any

import torch

from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.layout import Layout
from megatron_ext.planning.mixture import Mixture
from megatron_ext.planning.split import Split
from tests.helpers import models
from tests.helpers.live_memory import LiveMemory

ARCH = Architecture(
    **{"layers": 6, "hidden": 96, "ffn": 264, "heads": 4, "query_groups": 4, "head_size": 24},
    **{"vocab_size": 512, "vocab_multiple": 64},
)
DEEP = replace(ARCH, layers=9)
GROUPED = replace(ARCH, query_groups=2, head_size=32)
NORMED = replace(GROUPED, qk_norm=True, qkv_bias=True)
MIXTURE = Mixture(layers=(True,) * 6, experts=8, topk=2, ffn=72)
ROUTED = replace(ARCH, mixture=MIXTURE)
# The first layer is dense; experts that every token has.
SHARED = replace(MIXTURE, topk=3, shared=88, gate=True, dispatcher="alltoall")
MIXED = replace(ROUTED, mixture=replace(SHARED, layers=(False,) + (True,) * 5))
FINE = replace(ROUTED, mixture=replace(MIXTURE, experts=16, topk=4, ffn=24, dispatcher="alltoall"))
LAYERS = (ARCH, GROUPED, NORMED, ROUTED, replace(ROUTED, mixture=SHARED))
# On two ranks; a copy of the model each, unless the case says otherwise.
EACH = Layout(gpus=2, micro_batch=2, global_batch=4, sequence=128, cpu=True)
TP = replace(EACH, tp=2)
SP = replace(TP, sequence_parallel=True)
PP = replace(EACH, pp=2)
FULL: dict[str, Any] = {"recompute": "full"}
CASES = {
    "as it is": (ARCH, EACH),
    "grouped queries": (GROUPED, EACH),
    "large vocabulary": (replace(ARCH, vocab_size=8192), EACH),
    "logits that do not fit": (replace(ARCH, vocab_size=32768), EACH),
    "selective": (ARCH, replace(EACH, recompute="selective")),
    "full": (ARCH, replace(EACH, **FULL)),
    "full, groups of 3": (ARCH, replace(EACH, **FULL, recompute_layers=3)),
    "full, the first 3": (
        ARCH,
        replace(EACH, **FULL, recompute_method="block", recompute_layers=3),
    ),
    "TP 2": (ARCH, TP),
    "TP 2, norms and biases": (NORMED, TP),
    "TP 2, full": (DEEP, replace(TP, **FULL)),
    "TP 2, sequence parallel": (ARCH, SP),
    "TP 2, sequence parallel, selective": (ARCH, replace(SP, recompute="selective")),
    "TP 2, sequence parallel, full": (DEEP, replace(SP, **FULL)),
    "CP 2": (ARCH, replace(EACH, cp=2)),
    "CP 2, grouped queries, selective": (GROUPED, replace(EACH, cp=2, recompute="selective")),
    "CP 2, full": (DEEP, replace(EACH, cp=2, **FULL)),
    "experts": (ROUTED, EACH),
    "experts, some dense": (MIXED, EACH),
    "experts, full, groups of 3": (MIXED, replace(EACH, **FULL, recompute_layers=3)),
    "EP 2": (ROUTED, replace(EACH, ep=2)),
    "EP 2, all to all": (MIXED, replace(EACH, ep=2)),
    "TP 2, experts": (ROUTED, SP),
    "TP 2, EP 2": (MIXED, replace(SP, ep=2, expert_tp=1)),
    "PP 2, fine experts": (FINE, replace(PP, global_batch=8)),
    "PP 2, fine experts, full": (FINE, replace(PP, global_batch=8, **FULL)),
    "PP 2, interleaved, experts": (MIXED, replace(PP, vpp=3, global_batch=12)),
    "PP 2": (ARCH, replace(PP, global_batch=8)),
    "PP 2, uneven": (ARCH, replace(PP, last=2, global_batch=8)),
    "PP 2, uneven and interleaved": (ARCH, replace(PP, vpp=2, last=2, global_batch=8)),
    "PP 2, interleaved": (ARCH, replace(PP, vpp=3, global_batch=12)),
}


def main() -> None:
    """Print the peak of each case, and what autograd keeps of a layer, bytes a token."""
    torch.distributed.init_process_group("gloo")
    peaks = {name: _peak(arch, layout) for name, (arch, layout) in CASES.items()}
    _start(EACH)
    stacks = [[_saved(_stack(arch, layers)) for layers in (1, 2)] for arch in LAYERS]
    layers = [(two - one) / EACH.sequence for one, two in stacks]
    text = json.dumps([torch.distributed.get_rank(), peaks, layers])
    print(f"\nmeasured {text}\n", end="", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _peak(arch: Architecture, layout: Layout) -> int:
    step = _step(arch, layout)
    with LiveMemory() as memory:
        step()
    return memory.peak


def _step(arch: Architecture, layout: Layout) -> Any:
    """One step of Megatron's own schedule over the torch-native layers and the fused head."""
    _start(layout)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ext.plain import summed_loss

    chunks = [
        DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk)
        for chunk in _chunks(arch, layout)
    ]
    shape = (layout.micro_batch, layout.sequence // layout.cp)
    # Of all kinds, so that each expert has its share.
    tokens = torch.randint(arch.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(shape[1]).expand(*shape)

    head = {"loss_mask": torch.ones(shape), "output_processor": summed_loss}

    def forward(_: Any, chunk: Any) -> Any:
        output = chunk(tokens, positions, None, labels=tokens, **head)
        return output, lambda loss: (loss / tokens.numel(), {})

    def step() -> None:
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[None] * len(chunks),
            model=chunks,
            num_microbatches=layout.microbatches,
            seq_length=layout.sequence,
            micro_batch_size=layout.micro_batch,
            forward_only=False,
        )

    return step


def _start(layout: Layout) -> None:
    """Megatron's process groups, anew only where the layout is another one."""
    models.start(layout.tp, layout.cp)
    from megatron.core import parallel_state

    found = Split(
        layout.tp,
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    if found != layout.split._replace(first=None, last=None):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )


def _chunks(arch: Architecture, layout: Layout) -> list[Any]:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from megatron_ext.model.layer_spec import torch_native_layer_spec

    cfg = _config(
        arch,
        sequence_parallel=layout.sequence_parallel,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        num_layers_in_first_pipeline_stage=layout.first,
        num_layers_in_last_pipeline_stage=layout.last,
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=True,  # as Megatron's arguments set it
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        **_recompute(layout),
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return [
        GPTModel(
            config=cfg,
            transformer_layer_spec=torch_native_layer_spec(
                cfg, vp_stage=chunk if layout.vpp > 1 else None
            ),
            vocab_size=arch.padded_vocab(layout.tp),
            max_sequence_length=layout.sequence,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            pre_process=stage == 0 and chunk == 0,
            post_process=stage == layout.pp - 1 and chunk == layout.vpp - 1,
            vp_stage=chunk if layout.vpp > 1 else None,
        )
        for chunk in range(layout.vpp)
    ]


def _config(arch: Architecture, **more: Any) -> Any:
    return models.config(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.query_groups,
        kv_channels=arch.head_size,
        ffn_hidden_size=arch.ffn,
        qk_layernorm=arch.qk_norm,
        add_qkv_bias=arch.qkv_bias,
        **_experts(arch.mixture),
        **more,
    )


def _experts(mixture: Mixture | None) -> dict[str, Any]:
    if mixture is None:
        return {}
    return {
        "num_moe_experts": mixture.experts,
        "moe_router_topk": mixture.topk,
        "moe_ffn_hidden_size": mixture.ffn,
        "moe_layer_freq": [int(one) for one in mixture.layers],
        "moe_shared_expert_intermediate_size": mixture.shared or None,
        "moe_shared_expert_gate": mixture.gate,
        "moe_token_dispatcher_type": mixture.dispatcher,
        "bias_activation_fusion": True,  # as Megatron's arguments set it
    }


def _recompute(layout: Layout) -> dict[str, Any]:
    if layout.recompute != "full":
        return {"recompute_granularity": "selective"} if layout.recompute == "selective" else {}
    return {
        "recompute_granularity": "full",
        "recompute_method": layout.recompute_method,
        "recompute_num_layers": layout.recompute_layers,
    }


def _stack(arch: Architecture, layers: int) -> Architecture:
    """The model with its first layers only."""
    mixture = arch.mixture
    own = None if mixture is None else replace(mixture, layers=mixture.layers[:layers])
    return replace(arch, layers=layers, mixture=own)


def _saved(arch: Architecture) -> int:
    """Bytes that a stack of layers keeps for the backward pass, parameters left out."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_ext.model.layer_spec import torch_native_layer_spec

    cfg = _config(arch)
    block = TransformerBlock(cfg, torch_native_layer_spec(cfg), post_layer_norm=False)
    angles = RotaryEmbedding(arch.head_size, 1.0, use_cpu_initialization=True)(EACH.sequence)
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    # Storages stay referenced, so that no address is used twice.
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    hidden = torch.randn(EACH.sequence, 1, arch.hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(hidden, None, rotary_pos_emb=angles)
    return sum(storage.nbytes() for storage in kept.values())


if __name__ == "__main__":
    main()
