"""What `benchmarks.step` measures: shapes, variants, and a model with its optimizer for each.

Everything but the variant's own part is Megatron's: GPTModel, DistributedDataParallel, the
schedule, the optimizer, gradient norm and clipping.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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

from megatron_ext.model.layer_spec import torch_native_layer_spec
from megatron_ext.runtime.optimizer import enable

ROLE_FORGET, ROLE_LEARN = -1, 1
FORGET_WEIGHT = 0.01


@dataclass(frozen=True)
class Shape:
    """A Llama-like model and its batch."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int
    sequence: int
    batch: int  # samples of a step
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    def matmul_parameters(self, layers: int) -> int:
        """Parameters that multiply each token: four attention and three SwiGLU matrices a layer,
        and the LM head; the embedding is a lookup."""
        per_layer = 4 * self.hidden**2 + 3 * self.hidden * self.ffn
        return layers * per_layer + self.vocab * self.hidden

    def flops_per_token(self, layers: int, *, causal: bool) -> float:
        """Model FLOPs of forward and backward: 6 a parameter, and attention's two products at
        12 * layers * sequence * hidden, halved where the masked half is not counted."""
        attention = 12 * layers * self.sequence * self.hidden
        return 6 * self.matmul_parameters(layers) + attention * (0.5 if causal else 1.0)


PAPER_2B = Shape("2B of arXiv 2406.12397", 32, 2048, 5504, 32, 125_696, 4096, 16, torch.bfloat16)
# Head and attention have the shares of the FLOPs that they have in the 2B model (14% and 22%).
SMALL = Shape("small", 4, 512, 1376, 8, 4096, 1024, 2, torch.float32)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    native: bool  # our layer spec, else Megatron's local one
    fused_head: bool = False
    unlearn: bool = False
    micro_batch: int = 1
    distributed_optimizer: bool = False
    accelerated: bool = True  # megatron_ext.runtime.optimizer, where the layers are ours
    layers: int | None = None  # the shape's where None
    tags: tuple[str, ...] = field(default=())


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


def _final_hidden(*, hidden_states: Tensor, **_: Any) -> Tensor:
    return hidden_states


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
        self.reference: torch.nn.Module | None = None
        if variant.unlearn:
            self.reference = _gpt(config, shape, variant.native).eval().requires_grad_(False)
        self.batches = list(self._batches())
        self.positions = torch.arange(shape.sequence, device=self.device).unsqueeze(0)
        # Megatron's local attention reads the mask; ours does not need it.
        size = (1, 1, shape.sequence, shape.sequence)
        self.mask = (
            None
            if variant.native
            else torch.ones(size, dtype=torch.bool, device=self.device).triu(1)
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        generator = torch.Generator().manual_seed(1)
        count = self.shape.batch // self.variant.micro_batch
        for index in range(count):
            size = (self.variant.micro_batch, self.shape.sequence + 1)
            text = torch.randint(0, self.shape.vocab, size, generator=generator).to(self.device)
            forget = self.variant.unlearn and index < count // 2
            yield (
                text[:, :-1].contiguous(),
                text[:, 1:].contiguous(),
                (ROLE_FORGET if forget else ROLE_LEARN),
            )

    def _head(self, role: int, reference_hidden: Tensor | None) -> Callable[..., Tensor]:
        """Output processor: the mean loss of the microbatch through the fused head."""
        from megatron_ext.losses.head import unlearning_head

        def process(
            *, hidden_states: Tensor, output_layer: Any, labels: Tensor, **_: Any
        ) -> Tensor:
            s, b, width = hidden_states.shape
            has_reference = reference_hidden is not None
            out = unlearning_head(
                hidden_states.reshape(s * b, width),
                output_layer.weight,
                labels.t().reshape(-1),
                torch.full((s * b,), role, dtype=torch.int64, device=labels.device),
                reference_hidden=reference_hidden.reshape(s * b, width) if has_reference else None,
                reference_weight=self._reference_weight() if has_reference else None,
                fuse_weight_gradient=output_layer.config.gradient_accumulation_fusion,
            )
            if role == ROLE_FORGET:
                return FORGET_WEIGHT * functional.softplus(out.margin).mean()
            return (functional.softplus(-out.margin) + out.kl).mean()

        return process

    def _reference_weight(self) -> Tensor:
        reference: Any = self.reference
        return getattr(reference, "module", reference).output_layer.weight

    @torch.no_grad()
    def _reference_hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states `[s, b, hidden]` of the reference, in its own precision."""
        keep = {"fp32_output": False} if isinstance(self.reference, Float16Module) else {}
        assert self.reference is not None
        return self.reference(
            tokens, self.positions, self.mask, output_processor=_final_hidden, **keep
        )

    def _forward_step(self, batches: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Any]:
        tokens, labels, role = next(batches)
        kwargs: dict[str, Any] = {}
        if self.variant.fused_head:
            hidden = None
            if self.reference is not None and role == ROLE_LEARN:
                hidden = self._reference_hidden(tokens)
            kwargs = {"output_processor": self._head(role, hidden)}
        out = model(tokens, self.positions, self.mask, labels=labels, **kwargs)
        return out, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})

    def step(self) -> float:
        """One optimizer step over the whole batch; returns the mean loss."""
        with self._accelerated():
            return self._step()

    def _step(self) -> float:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        terms = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(self.batches),
            model=[self.model],
            num_microbatches=len(self.batches),
            seq_length=self.shape.sequence,
            micro_batch_size=self.variant.micro_batch,
            forward_only=False,
        )
        updated, _, _ = self.optimizer.step()
        assert updated, "the optimizer skipped the step"
        return float(torch.stack([term["loss"] for term in terms]).mean())
