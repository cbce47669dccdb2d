"""What `benchmarks.step` measures: a model with its optimizer and a step for each variant.

Everything but the variant's own part is Megatron's: GPTModel, DistributedDataParallel, the
schedule, the optimizer, gradient norm and clipping.
"""

import copy
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.nn import functional

from benchmarks.step_variants import Shape, Variant
from megatron_ext.model.layer_spec import torch_native_layer_spec
from megatron_ext.runtime.optimizer import enable


def _config(shape: Shape, variant: Variant) -> TransformerConfig:
    low = shape.dtype == torch.bfloat16
    cuda = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=variant.layers or shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=low,
        params_dtype=shape.dtype,
        pipeline_dtype=shape.dtype,
        use_cpu_initialization=not cuda,
        persist_layer_norm=False,
        masked_softmax_fusion=False,  # its CUDA extension comes with Apex only
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        gradient_accumulation_fusion=cuda and variant.native and variant.accelerated,
        recompute_granularity="selective" if variant.recompute else None,
    )


def _gpt(config: TransformerConfig, shape: Shape, native: bool) -> torch.nn.Module:
    spec = (
        torch_native_layer_spec(config)
        if native
        else get_gpt_layer_local_spec(normalization=config.normalization)
    )
    model: torch.nn.Module = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.vocab,
        max_sequence_length=shape.sequence,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    if torch.cuda.is_available():
        model.cuda()
    return Float16Module(config, model) if config.bf16 else model


def unlearn_step(shape: Shape, variant: Variant, reference: torch.nn.Module) -> Any:
    """The product's own unlearning step, with a reference in memory instead of in a checkpoint."""
    from megatron.training import global_vars

    from megatron_ext.config import UnlearnConfig
    from megatron_ext.reference import FrozenReference
    from megatron_ext.training import UnlearnStep

    class RandomReference(FrozenReference):
        def __init__(self) -> None:
            self.chunks = [reference.eval().requires_grad_(False)]
            if variant.reference_offload:
                self.offload()

    if global_vars._GLOBAL_TIMERS is None:
        global_vars._set_timers(Namespace(timing_log_level=0, timing_log_option="minmax"))
    args = Namespace(
        global_batch_size=shape.batch,
        micro_batch_size=variant.micro_batch,
        data_parallel_size=1,
        context_parallel_size=1,
        pipeline_model_parallel_size=1,
        seq_length=shape.sequence,
        unpadded_vocab_size=shape.vocab,
        create_attention_mask_in_dataloader=False,
        dataloader_inter_document_masking=False,
        check_for_nan_in_loss_and_grad=False,
        log_straggler=False,
        overlap_param_gather=False,
    )
    config = UnlearnConfig(forget_data_path=["random"])
    frozen = RandomReference()
    return UnlearnStep(args, config, reference=lambda: frozen)


class Trainer:
    """A model, its optimizer and one training step over fixed random tokens."""

    def __init__(self, shape: Shape, variant: Variant) -> None:
        self.shape, self.variant = shape, variant
        with self._accelerated():
            self._build()

    @contextmanager
    def _accelerated(self) -> Iterator[None]:
        """Our optimizer kernels for this variant alone; stock ones can take turns with it."""
        undo = enable() if self.variant.native and self.variant.accelerated else None
        try:
            yield
        finally:
            if undo is not None:
                undo()

    def _build(self) -> None:
        shape, variant = self.shape, self.variant
        torch.manual_seed(0)
        config = _config(shape, variant)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=variant.distributed_optimizer
        )
        model = _gpt(config, shape, variant.native)
        self.model = DistributedDataParallel(config, ddp, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=5e-5,
                weight_decay=0.1,
                clip_grad=1.0,
                bf16=config.bf16,
                params_dtype=shape.dtype,
                use_distributed_optimizer=variant.distributed_optimizer,
            ),
            [self.model],
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self.device = next(self.model.parameters()).device
        # Megatron's local attention reads the mask; ours does not need it.
        size = (1, 1, shape.sequence, shape.sequence)
        self.mask = (
            None
            if variant.native
            else torch.ones(size, dtype=torch.bool, device=self.device).triu(1)
        )
        self.config = config
        self._choose_step()

    def _choose_step(self) -> None:
        """Batches, forward step and schedule of the variant."""
        self.batches = list(self._batches())
        self.run_schedule = get_forward_backward_func()
        self.forward_step: Callable[..., Any] = self._plain_forward_step
        if self.variant.unlearn:
            frozen = copy.copy(self.config)  # no gradients, as the product builds it
            frozen.gradient_accumulation_fusion = False
            reference = _gpt(frozen, self.shape, self.variant.native)
            unlearn = unlearn_step(self.shape, self.variant, reference)
            self.forward_step = unlearn.forward_step
            self.run_schedule = partial(unlearn.forward_backward, self.run_schedule)

    def sibling(self, variant: Variant) -> "Trainer":
        """Another step of the same model and optimizer."""
        assert variant.shares_model(self.variant)
        other = copy.copy(self)
        other.variant = variant
        other._choose_step()
        return other

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Random microbatches as Megatron's loader gives them, pinned on the host; the sign of the
        mask is the role."""
        generator = torch.Generator().manual_seed(1)
        shape, size = self.shape, self.variant.micro_batch
        count = shape.batch // size
        for index in range(count):
            text = torch.randint(0, shape.vocab, (size, shape.sequence + 1), generator=generator)
            role = -1.0 if self.variant.unlearn and index < count // 2 else 1.0
            batch = {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": torch.full((size, shape.sequence), role),
                "position_ids": torch.arange(shape.sequence).repeat(size, 1),
            }
            cuda = self.device.type == "cuda"
            yield {key: t.pin_memory() if cuda else t for key, t in batch.items()}

    def _plain_forward_step(
        self, batches: Iterator[dict[str, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        batch = {key: t.to(self.device, non_blocking=True) for key, t in next(batches).items()}
        kwargs: dict[str, Any] = {}
        if self.variant.fused_head:
            from megatron_ext.plain import summed_loss

            kwargs = {"output_processor": summed_loss, "loss_mask": batch["loss_mask"].abs()}
        out = model(
            batch["tokens"], batch["position_ids"], self.mask, labels=batch["labels"], **kwargs
        )
        tokens = batch["tokens"].numel()

        def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = losses.sum() / tokens  # of ours already a sum
            return loss, {"loss": loss.detach()}

        return out, mean

    def step(self) -> float:
        """One optimizer step over the whole batch; returns the mean loss."""
        with self._accelerated():
            return self._step()

    def _step(self) -> float:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self.run_schedule(
            forward_step_func=self.forward_step,
            data_iterator=iter(self.batches),
            model=[self.model],
            num_microbatches=len(self.batches),
            seq_length=self.shape.sequence,
            micro_batch_size=self.variant.micro_batch,
            forward_only=False,
        )
        updated, _, _ = self.optimizer.step()
        assert updated, "the optimizer skipped the step"
        name = "unlearn loss" if self.variant.unlearn else "loss"
        return float(torch.stack([report[name] for report in reports]).mean())
