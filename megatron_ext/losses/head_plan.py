"""What one call of the unlearning head has decided, and what its autograd functions do with a block.

T tokens, H hidden size, V vocabulary columns of this shard; c tokens and v columns of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.losses.head_linear import gather_tokens, project
from megatron_ext.losses.head_memory import Blocks
from megatron_ext.losses.vocab_parallel import RowStatistics


@dataclass(frozen=True)
class HeadPlan:
    """All that one call of the head has decided; see `unlearning_head`.

    `blocks`: what exists at a time; if `blocks.whole`, the student's logits are made, and if `keep` kept,
    all at once. `keep`: there will be a backward pass.
    """

    kernels: ModuleType
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    vocab_start: int
    valid_columns: int
    references: int
    blocks: Blocks
    fp32_logits: bool
    fuse_weight_gradient: bool
    keep: bool

    def sorted_tokens(
        self,
        hidden: Tensor,
        labels: Tensor,
        order: Tensor | None,
        reference_hidden: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """In the order of the blocks: hidden states `[T, H]`, labels `[T]`, the reference's `[R, H']`."""
        group = self.group if self.sequence_parallel else None
        tokens = gather_tokens(hidden, group)
        if reference_hidden is not None:
            reference_hidden = gather_tokens(reference_hidden, group)
        if order is None:
            return tokens, labels, reference_hidden
        if reference_hidden is not None:
            reference_hidden = reference_hidden[order[: self.references]]
        return tokens[order], labels[order], reference_hidden

    def tiles(self, tokens: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """Rows of the sorted tokens and columns of this shard of each block."""
        for i in range(0, max(tokens, 1), self.blocks.tokens):
            rows = slice(i, min(i + self.blocks.tokens, tokens))
            for j in range(0, columns, self.blocks.columns):
                yield rows, slice(j, min(j + self.blocks.columns, columns))

    def place(self, columns: slice) -> dict[str, int]:
        """Where a block's columns are in the vocabulary."""
        width = columns.stop - columns.start
        return {
            "vocab_start": self.vocab_start + columns.start,
            "valid_columns": min(max(self.valid_columns - columns.start, 0), width),
        }

    def student(self, hidden: Tensor, weight: Tensor, space: Tensor | None = None) -> Tensor:
        """Logits `[c, v]`; on `space` see `project`."""
        return project(hidden, weight, fp32=self.fp32_logits, space=space)

    def reference(
        self,
        rows: slice,
        columns: slice,
        hidden: Tensor | None,
        weight: Tensor | None,
        space: Tensor | None = None,
    ) -> Tensor | None:
        """The reference's logits of the first tokens of a block; None if none of them has any."""
        if hidden is None or weight is None or rows.start >= self.references:
            return None
        first = hidden[rows.start : min(rows.stop, self.references)]
        return project(first, weight[columns], fp32=self.fp32_logits, space=space)

    def statistics(
        self, logits: Tensor, reference: Tensor | None, labels: Tensor, columns: slice
    ) -> Tensor:
        """`[2, c]` or, if the call has references, `[5, c]` statistics of a block."""
        place = self.place(columns)
        if not self.references:
            return self.kernels.shard_statistics(logits, labels, **place)
        n = 0 if reference is None else reference.shape[0]
        if n == logits.shape[0]:
            return self.kernels.shard_statistics(
                logits, labels, reference_logits=reference, **place
            )
        # Zeros for log-sum-exp of student and reference alike join to a KL of 0.
        stats = logits.new_zeros(5, logits.shape[0], dtype=torch.float64)
        if n:
            stats[:, :n] = self.kernels.shard_statistics(
                logits[:n], labels[:n], reference_logits=reference, **place
            )
        stats[:2, n:] = self.kernels.shard_statistics(logits[n:], labels[n:], **place)
        return stats

    def gradient(
        self,
        logits: Tensor,
        reference: Tensor | None,
        labels: Tensor,
        rows: RowStatistics,
        grad_margin: Tensor | None,
        grad_kl: Tensor | None,
        columns: slice,
        out: Tensor,
    ) -> Tensor:
        """Gradient of a block's logits `[c, v]`, written to `out`, which may be `logits`."""
        n = 0 if reference is None or grad_kl is None else reference.shape[0]
        for part in (slice(0, n), slice(n, logits.shape[0])):
            if part.start == part.stop:
                continue
            with_kl = part.start == 0 and n > 0
            self.kernels.logits_gradient(
                logits[part],
                labels[part],
                slice_rows(rows, part),
                None if grad_margin is None else grad_margin[part],
                grad_kl[part] if with_kl and grad_kl is not None else None,
                reference_logits=reference if with_kl else None,
                out=out[part],
                **self.place(columns),
            )
        return out


def slice_rows(rows: RowStatistics, part: slice) -> RowStatistics:
    """The statistics of some of the tokens."""
    return RowStatistics(
        rows.margin[part],
        rows.kl[part],
        rows.lse_rest[part],
        None if rows.lse_z is None else rows.lse_z[part],
        None if rows.lse_t is None else rows.lse_t[part],
    )
