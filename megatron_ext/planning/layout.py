"""How a run is spread over GPUs, and what unlearning adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_ext.batches import check_batch_size, check_expert_ranks, check_ranks
from megatron_ext.exceptions import ConfigError
from megatron_ext.planning.architecture import Architecture
from megatron_ext.planning.mixture import Mixture
from megatron_ext.planning.split import Split
from megatron_ext.stages import check_stages

Recompute = Literal["none", "selective", "full"]


class Place(NamedTuple):
    """What a rank is.

    Attributes:
        stage: pipeline rank.
        shard: which of the ranks with the same weights.
        expert_shard: which of the ranks with the same experts.
    """

    stage: int
    shard: int
    expert_shard: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread over GPUs.

    Attributes:
        gpus: ranks of the run.
        micro_batch: sequences of a microbatch.
        global_batch: sequences of a step.
        sequence: tokens of a sequence.
        tp: tensor-parallel size.
        cp: context-parallel size: ranks among which each sequence is split.
        pp: pipeline-parallel size.
        vpp: model chunks of a pipeline rank; above 1 the schedule is interleaved.
        ep: expert-parallel size: groups into which the experts of a layer are divided.
        first: layers of the first pipeline stage; None: as many as one between.
        last: layers of the last pipeline stage; None: as many as one between.
        expert_tp: tensor-parallel size of experts; None: that of the rest.
        sequence_parallel: whether TP divides the norms' activations too.
        distributed_optimizer: whether data-parallel ranks share the optimizer's state.
        half: bf16 or fp16 weights.
        gradient: bytes of a gradient as it is summed and reduced; 2 in fp16, unless
            `--accumulate-allreduce-grads-in-fp32`, and in bf16 with `--grad-reduce-in-bf16`.
        recompute: what the backward pass makes again.
        recompute_method: of full recompute: groups of layers, or the first layers of a chunk.
        recompute_layers: layers of a group, or how many first layers.
        overlap_gradients: `--overlap-grad-reduce`; also decides whether gradients are in buckets.
        overlap_parameters: `--overlap-param-gather`.
        bucket_size: `--ddp-bucket-size`, in elements; None for Megatron's default.
        cpu: whether the ranks are CPUs, where torch composes RMSNorm of several steps.

    Raises:
        ConfigError: the batch, the GPUs or the microbatches do not divide.
    """

    gpus: int
    micro_batch: int
    global_batch: int
    sequence: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    first: int | None = None
    last: int | None = None
    expert_tp: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    half: bool = False
    gradient: int = 4
    recompute: Recompute = "none"
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_layers: int = 1
    overlap_gradients: bool = False
    overlap_parameters: bool = False
    bucket_size: int | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        sizes = {"tensor_model": self.tp, "context": self.cp, "pipeline_model": self.pp}
        check_ranks(self.gpus, sizes, named="--gpus")
        if self.cp > 1 and self.sequence % (2 * self.cp):
            raise ConfigError(
                f"--seq-length: expected a multiple of {2 * self.cp} (2 x CP {self.cp}, the parts that a "
                f"sequence is split into), found {self.sequence}"
            )
        check_batch_size(
            self.global_batch, micro=self.micro_batch, data_parallel=self.data_parallel
        )
        # The rest of the last group of microbatches would leave stages idle; Megatron refuses it.
        if self.vpp > 1 and self.microbatches % self.pp:
            unit = self.micro_batch * self.data_parallel * self.pp
            raise ConfigError(
                f"--global-batch-size: expected a multiple of {unit} (micro-batch "
                f"{self.micro_batch} x DP {self.data_parallel} x PP {self.pp}, for the interleaved "
                f"schedule), found {self.global_batch}"
            )

    @property
    def data_parallel(self) -> int:
        """Copies of the model, or rather groups of ranks with the same samples."""
        return self.gpus // self.model_parallel

    @property
    def model_parallel(self) -> int:
        """Ranks that share a sample."""
        return self.tp * self.cp * self.pp

    @property
    def shards(self) -> int:
        """Ranks with the same weights, which sum gradients and share the optimizer's state."""
        return self.data_parallel * self.cp

    @property
    def etp(self) -> int:
        """Tensor-parallel size of experts."""
        return self.tp if self.expert_tp is None else self.expert_tp

    @property
    def expert_shards(self) -> int:
        """Ranks with the same experts; context parallelism does not set them apart."""
        return self.gpus // (self.ep * self.etp * self.pp)

    @property
    def split(self) -> Split:
        """How the model's tensors are divided."""
        return Split(self.tp, self.pp, self.vpp, self.ep, self.etp, self.first, self.last)

    @property
    def microbatches(self) -> int:
        """Microbatches of each copy in a step."""
        return self.global_batch // (self.micro_batch * self.data_parallel)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on a rank."""
        return self.micro_batch * self.sequence // self.cp

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.global_batch * self.sequence

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.half else 4

    @property
    def sequence_split(self) -> int:
        """Among how many ranks the tokens of norms and residuals are divided."""
        return self.tp if self.sequence_parallel else 1

    def place(self, rank: int) -> Place:
        """Pipeline stage of a rank, which of the `shards` it has, and which of the `expert_shards`.

        TP varies fastest, then CP, then DP, then PP; for experts their TP, then EP, then DP.
        """
        stage, within = divmod(rank, self.tp * self.shards)
        return Place(stage, within // self.tp, within // (self.etp * self.ep))

    def in_flight(self, stage: int) -> int:
        """Model chunks whose activations a stage holds at once: warm-up passes of 1F1B, and one more.

        Without chunks stage i of p holds `p - i` microbatches (arXiv 2104.04473, section 2.2.1); the
        interleaved schedule holds `2 (p - i - 1) + (v - 1) p + 1` chunks (Megatron-Core's
        `get_pp_rank_microbatches`).
        """
        behind = self.pp - stage - 1
        held = behind + 1 if self.vpp == 1 else 2 * behind + (self.vpp - 1) * self.pp + 1
        return min(held, self.microbatches * self.vpp)


@dataclass(frozen=True, kw_only=True)
class Unlearning:
    """What an unlearning step has beside plain training.

    Attributes:
        forget_batch: forgotten samples of a global batch.
        reference: whether a frozen reference model takes part.
        reference_offload: whether its weights wait on the host.
        hidden_offload: whether its final hidden states wait on the host.
        fp32_logits: whether the head leaves logits unrounded.
    """

    forget_batch: int
    reference: bool = True
    reference_offload: bool = False
    hidden_offload: bool = False
    fp32_logits: bool = False


def check_mixture(mixture: Mixture, layout: Layout) -> None:
    """Refuse a layout that does not divide the experts.

    Raises:
        ConfigError: names the flag, what was expected and what was found.
    """
    check_expert_ranks(
        mixture.experts,
        layout.gpus,
        sizes={"tensor_model": layout.tp, "expert_model": layout.ep, "pipeline_model": layout.pp},
        expert_tensor=layout.expert_tp,
        sequence_parallel=layout.sequence_parallel,
        named="--gpus",
    )
    for flag, width, ranks, named in (
        ("--moe-ffn-hidden-size", mixture.ffn, layout.etp, "the experts' TP"),
        ("--moe-shared-expert-intermediate-size", mixture.shared, layout.tp, "TP"),
    ):
        if width % ranks:
            raise ConfigError(f"{flag}: expected a multiple of {named} {ranks}, found {width}")


def check(arch: Architecture, layout: Layout, unlearning: Unlearning | None = None) -> None:
    """Refuse a layout that does not divide this model or its forgotten samples.

    Raises:
        ConfigError: names the flag, what was expected and what was found.
    """
    check_stages(arch.layers, layout.pp, chunks=layout.vpp, first=layout.first, last=layout.last)
    dense = arch.mixture is None or not all(arch.mixture.layers)
    if arch.heads % layout.tp or (dense and arch.ffn % layout.tp):
        raise ConfigError(
            f"--num-attention-heads, --ffn-hidden-size: expected multiples of TP {layout.tp}, "
            f"found {arch.heads} and {arch.ffn}"
        )
    if arch.mixture is not None:
        check_mixture(arch.mixture, layout)
    # With fewer groups than TP every rank gathers and keeps the whole projection.
    if arch.query_groups % layout.tp:
        raise ConfigError(
            f"--num-query-groups: expected a multiple of TP {layout.tp}, as the plan requires, found "
            f"{arch.query_groups}"
        )
    if arch.padded_vocab(layout.tp) % layout.tp:
        raise ConfigError(
            f"--padded-vocab-size: expected a multiple of TP {layout.tp}, found {arch.padded}"
        )
    unit = layout.micro_batch * layout.data_parallel
    if unlearning is not None and unlearning.forget_batch % unit:
        raise ConfigError(
            f"--forget-batch-size: expected a multiple of {unit} (micro-batch size "
            f"{layout.micro_batch} x data-parallel size {layout.data_parallel}), found "
            f"{unlearning.forget_batch}"
        )
