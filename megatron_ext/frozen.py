"""A model that does not learn: the chunks of a checkpoint's weights on this rank, and what they say.

It is built by the builder of the model that learns, under the same parallel layout, and read by
Megatron's own schedule, forward only: final hidden states on the last stage, one hidden vector a token
instead of a row of logits. The reference of an unlearning run is one; so is a model that is evaluated.
"""

from __future__ import annotations

import copy
import dataclasses
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import fully_parallel
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from megatron_ext.checkpoint.digest import model_digest
from megatron_ext.checkpoint.extra_state import keep_own
from megatron_ext.checkpoint.inspect import Checkpoint
from megatron_ext.checkpoint.torch_dist import MODEL_KEYS
from megatron_ext.data.batch import MicroBatch
from megatron_ext.exceptions import CheckpointError
from megatron_ext.head import head_margins
from megatron_ext.runtime.offload import to_host


class FrozenModel:
    """The model's chunks on this rank, without gradients.

    Args:
        model_config: the config of the architecture; of a reference, the one of the student.
        args: Megatron's validated arguments.
        checkpoint: the weights.
        flag: what named the checkpoint, for messages.

    Attributes:
        checkpoint: the weights' checkpoint.
        chunks: the model's chunks, in the order of Megatron's.
        digest: of the weights as they were loaded.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape.
    """

    # How the weights come to the device for a pass, where they are kept elsewhere.
    _on_device: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(
        self, model_config: Any, *, args: Namespace, checkpoint: Checkpoint, flag: str
    ) -> None:
        self.checkpoint = checkpoint
        self._flag = flag
        self._vocab_size: int = args.unpadded_vocab_size
        self.chunks = self.build(model_config)
        self._load(_load_strategy(args))
        self.digest = self.compute_digest()

    @staticmethod
    def build(model_config: Any) -> list[MegatronModule]:
        """Build the chunks by Megatron's builder, without gradients or random numbers.

        Args:
            model_config: the config of the architecture.

        Returns:
            The chunks of this rank; their weights are arbitrary.
        """
        transformer = copy.deepcopy(model_config.transformer)
        # Every weight is overwritten by the load; initialising would draw from the student's generators.
        transformer.perform_initialization = False
        transformer.recompute_granularity = None
        transformer.gradient_accumulation_fusion = False
        # Graphs are recorded in training alone and asked for in every later pass; and the first pass of
        # a run, which is the reference's, would decide what is offloaded.
        transformer.cuda_graph_impl = "none"
        transformer.fine_grained_activation_offloading = False
        if transformer.fp8:
            transformer.tp_comm_overlap = False  # its buffers were made for fp8 alone
        # fp8's scales are learnt where gradients are: without them a KL would be against another model.
        transformer.fp8 = transformer.fp4 = None
        transformer.fp8_param = transformer.fp4_param = False
        transformer.quant_recipe = None
        # Tokens of an expert would be padded to a multiple of what fp8 needs, of which there is none.
        transformer.moe_router_padding_for_quantization = False
        transformer.moe_router_padding_for_fp8 = False
        transformer.moe_input_jitter_eps = (
            None  # noise that a router adds without asking for training
        )
        frozen_config = dataclasses.replace(
            model_config, transformer=transformer, pre_wrap_hooks=[], post_wrap_hooks=[]
        )
        builder = frozen_config.get_builder_cls()(frozen_config)
        chunks: list[MegatronModule] = builder.build_distributed_models(
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
        )
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        return chunks

    def _sharded_state(self) -> dict[str, Any]:
        return {
            f"model{i}": chunk.sharded_state_dict()
            for i, chunk in enumerate(unwrap_model(self.chunks))
        }

    def _shards(self) -> list[ShardedTensor]:
        state = self._sharded_state()
        apply_factories(state)
        return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]

    def _load(self, strategy: Any) -> None:
        path = str(self.checkpoint.path)
        present = load_sharded_metadata(path)
        self._check_keys(present)
        wanted = self._sharded_state()
        keep_own(wanted, present)
        loaded = dist_checkpointing.load(wanted, path, strategy)
        for i, chunk in enumerate(unwrap_model(self.chunks)):
            chunk.load_state_dict(loaded[f"model{i}"], strict=True)

    def _check_keys(self, present: dict[str, Any]) -> None:
        """Every tensor of the checkpoint is wanted by some rank, and every wanted one is there."""
        shapes = {t.key: (tuple(t.global_shape), t.allow_shape_mismatch) for t in self._shards()}
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, shapes)
        wanted = {key: value for part in gathered for key, value in part.items()}
        found = {
            key: tuple(tensor.global_shape)
            for key, tensor in present.items()
            if isinstance(tensor, ShardedTensor) and key.startswith(MODEL_KEYS)
        }
        named = f"{self._flag} {self.checkpoint.path}"
        for label, keys in (
            ("missing", wanted.keys() - found.keys()),
            ("more", found.keys() - wanted.keys()),
        ):
            if keys:
                raise CheckpointError(
                    f"{named}: expected the tensors of this architecture, found {len(keys)} {label}, "
                    f"{min(keys)} among them"
                )
        for key, (shape, padded) in wanted.items():
            # Rows of vocabulary-sized tensors are padded for the layout; the rest must agree.
            skip = 1 if padded else 0
            if shape[skip:] != found[key][skip:]:
                raise CheckpointError(
                    f"{named}: expected {key} of shape {shape}, found {found[key]}"
                )

    def compute_digest(self) -> str:
        """Digest of the weights as they are now, the same on every rank and layout."""
        with self._on_device():
            return model_digest(self._shards(), vocab_size=self._vocab_size)

    def output_weight(self) -> torch.Tensor:
        """LM-head weight on the last stage, ``[V/tp, H]``."""
        last = unwrap_model(self.chunks)[-1]
        if last.share_embeddings_and_output_weights:
            return last.shared_embedding_or_output_weight()
        return last.output_layer.weight

    @torch.no_grad()
    def margins(
        self, hidden: torch.Tensor, labels: torch.Tensor, *, fp32_logits: bool
    ) -> torch.Tensor:
        """The model's margin of every token of a microbatch, on the last stage.

        Args:
            hidden: what :meth:`hidden_states` returned of the microbatch.
            labels: int64 ``[b, s]``.
            fp32_logits: leave the logits unrounded.

        Returns:
            fp32 ``[s * b]``, sequence-major.
        """
        return head_margins(
            hidden,
            output_layer=unwrap_model(self.chunks)[-1].output_layer,
            output_weight=self.output_weight(),
            labels=labels,
            vocab_size=self._vocab_size,
            fp32_logits=fp32_logits,
        )

    @torch.no_grad()
    def hidden_states(
        self,
        schedule: Callable[..., Any],
        batches: Sequence[Sequence[MicroBatch]],
        *,
        seq_length: int,
        micro_batch_size: int,
        offload: bool = False,
        **schedule_arguments: Any,
    ) -> list[torch.Tensor]:
        """Run the model over microbatches by Megatron's schedule.

        Args:
            schedule: Megatron's ``forward_backward_func``.
            batches: for each model chunk of this rank its microbatches, in order.
            seq_length: tokens of a sequence, before it is split for context parallelism.
            micro_batch_size: sequences of a microbatch.
            offload: leave the hidden states in host memory.
            **schedule_arguments: passed on to the schedule.

        Returns:
            On the last stage the final hidden states of each microbatch, ``[s, b, H]`` in the model's
            precision (``[s/tp, b, H]`` under sequence parallelism); an empty list on other stages.
        """
        wanted = len(batches[0])
        iterators, count = self._fit_schedule(batches)
        captured: list[torch.Tensor] = []

        def keep(hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            hidden = hidden_states.detach()
            captured.append(to_host(hidden) if offload else hidden)
            # The schedule passes an output on; a row of hidden states need not be upcast for it.
            return hidden_states.new_zeros(1)

        def forward_step(iterator: Iterator[MicroBatch], model: MegatronModule) -> tuple[Any, Any]:
            batch = next(iterator)
            output = model(
                batch.tokens,
                batch.position_ids,
                batch.attention_mask,
                packed_seq_params=batch.documents,
                output_processor=keep,
            )
            return output, lambda output_tensor, non_loss_data: None

        with self._on_device():
            schedule(
                forward_step_func=forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.chunks,
                num_microbatches=count,
                seq_length=seq_length,
                micro_batch_size=micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
                **schedule_arguments,
            )
        return captured[:wanted]

    def _fit_schedule(
        self, batches: Sequence[Sequence[MicroBatch]]
    ) -> tuple[list[Iterator[MicroBatch]], int]:
        """Give the interleaved schedule at least as many microbatches as it has stages.

        Microbatches that only fill the pipeline repeat the last one, and their hidden states are dropped.
        """
        count = len(batches[0])
        if len(self.chunks) > 1:
            stages = unwrap_model(self.chunks)[0].config.pipeline_model_parallel_size
            count = max(count, stages)
            group = schedule_group(count, stages)
            for chunk in unwrap_model(self.chunks):
                chunk.config.microbatch_group_size_per_vp_stage = group
        padded = [[*chunk, *[chunk[-1]] * (count - len(chunk))] for chunk in batches]
        return [iter(chunk) for chunk in padded], count


def schedule_group(microbatches: int, stages: int) -> int:
    """Microbatches that a chunk sees before the next chunk does, in Megatron's interleaved schedule.

    As few as it allows, because the first stage holds what comes round for the next chunk: at least as many
    as there are stages, in the last group too.
    """
    return next(
        group
        for group in range(stages, microbatches + 1)
        if microbatches % group == 0 or microbatches % group >= stages
    )


def _load_strategy(args: Namespace) -> Any:
    """As for a model that learns: by ``--ckpt-fully-parallel-load`` data-parallel ranks read a part each."""
    if not args.ckpt_fully_parallel_load:
        return None
    return fully_parallel.FullyParallelLoadStrategyWrapper(
        TorchDistLoadShardedStrategy(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        exchange_algo=args.ckpt_fully_parallel_load_exchange_algo,
    )
