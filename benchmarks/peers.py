"""What the head is measured against: other ways to compute the same loss of the same tokens.

A peer is a function of a `Workload` that returns the scalar loss; its gradients in `hidden` and
`weight` are part of what is timed. A peer that cannot be imported raises ImportError.

| peer | how |
|---|---|
| ours-terms | `unlearning_head`: the loss is not known before backward |
| ours-candidate | ours with the kernels that are to replace the default ones (GPU) |
| ours-halves, ours-lean | ours in chunks of a half, a quarter of the tokens (GPU) |
| naive | logits, log-softmax and probabilities of all tokens in fp32 memory, autograd |
| compiled | `torch.compile` of naive |
| megatron | Megatron's vocab-parallel cross-entropy on materialised logits, and an eager KL |
| liger | `LigerFusedLinearCrossEntropyLoss` per token, `LigerFusedLinearJSD` at beta 0 (the KL) |
| cce+liger | `linear_cross_entropy` of cut-cross-entropy per token, and Liger's KL |

Those of cross-entropies get the forget loss from them: -ln(1 - p) = -ln(1 - e^-ce), which is
inexact for p near 1. It is cheap, so the comparison of speed is fair to them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megatron_ext.losses.head import unlearning_head
from megatron_ext.losses.head_loss import unlearning_head_loss
from megatron_ext.losses.objectives import bounded_forgetting, cross_entropy


@dataclass
class Workload:
    """Tokens of one microbatch, forget first, and their model's and reference's last layer."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [T]
    roles: Tensor  # [T], on the CPU: who made the batch knows them
    forget: int  # how many of the tokens are to be forgotten
    reference_hidden: Tensor | None  # [T, H]
    reference_weight: Tensor | None  # [V, H]


REFERENCES = ("none", "half", "all")


def make_workload(
    tokens: int, hidden: int, vocab: int, *, reference: str, dtype: torch.dtype, device: str
) -> Workload:
    """Random tokens of a model about 0.1 away from its reference; logits of a spread of 2.

    Args:
        reference: "none": half forget, half learn. "half": half forget, half replay with a
            reference. "all": all replay with a reference.
    """
    generator = torch.Generator(device).manual_seed(tokens + vocab)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    h = normal(tokens, hidden, scale=1.0)
    w = normal(vocab, hidden, scale=2.0 / hidden**0.5)
    forget = 0 if reference == "all" else tokens // 2
    roles = torch.ones(tokens, dtype=torch.int8)
    roles[:forget] = -1
    with_reference = reference != "none"
    return Workload(
        hidden=h.clone().requires_grad_(),
        weight=w.clone().requires_grad_(),
        labels=torch.randint(vocab, (tokens,), generator=generator, device=device),
        roles=roles,
        forget=forget,
        reference_hidden=h + normal(tokens, hidden, scale=0.1) if with_reference else None,
        reference_weight=w.clone() if with_reference else None,
    )


def ours(w: Workload, **options: object) -> Tensor:
    """As in training: the loss is known to the head."""
    tokens = w.labels.shape[0]
    forget = torch.zeros(tokens, device=w.labels.device)
    forget[: w.forget] = 1 / max(w.forget, 1)
    learn = torch.zeros_like(forget)
    learn[w.forget :] = 1 / (tokens - w.forget)

    def token_loss(margin: Tensor, kl: Tensor, places: slice | Tensor) -> Tensor:
        loss = (cross_entropy(margin) + kl) * learn[places]
        return (loss + bounded_forgetting(margin) * forget[places]).sum()

    return unlearning_head_loss(token_loss=token_loss, **_head_arguments(w), **options).loss


def terms(w: Workload, **options: object) -> Tensor:
    """As with a loss of one's own on the terms of every token."""
    out = unlearning_head(**_head_arguments(w), **options)
    loss = cross_entropy(out.margin[w.forget :]).mean()
    if w.forget:
        loss = loss + bounded_forgetting(out.margin[: w.forget]).mean()
    if w.reference_hidden is not None:
        loss = loss + out.kl[w.forget :].mean()
    return loss


def _head_arguments(w: Workload) -> dict[str, Tensor | None]:
    names = ("hidden", "weight", "labels", "roles", "reference_hidden", "reference_weight")
    return {name: getattr(w, name) for name in names}


def _from_cross_entropy(ce: Tensor, w: Workload) -> Tensor:
    """Forget and learn terms from the cross-entropy of every token."""
    loss = ce[w.forget :].mean()
    if w.forget:
        loss = loss - torch.log(-torch.expm1(-ce[: w.forget])).mean()
    return loss


def _dense_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_hidden: Tensor | None,
    reference_weight: Tensor | None,
    forget: int,
) -> Tensor:
    """The loss as one writes it down: everything in fp32, everything in memory."""
    log_p = F.log_softmax((hidden @ weight.t()).float(), dim=-1)
    ce = -log_p.gather(1, labels[:, None]).squeeze(1)
    loss = ce[forget:].mean()
    if forget:
        loss = loss - torch.log1p(-torch.exp(-ce[:forget])).mean()
    if reference_hidden is not None and reference_weight is not None:
        with torch.no_grad():
            t = (reference_hidden[forget:] @ reference_weight.t()).float()
            log_t = F.log_softmax(t, dim=-1)
        kl = F.kl_div(log_p[forget:], log_t, log_target=True, reduction="sum")
        loss = loss + kl / (labels.shape[0] - forget)
    return loss


def _arguments(w: Workload) -> tuple:
    return (w.hidden, w.weight, w.labels, w.reference_hidden, w.reference_weight, w.forget)


def naive(w: Workload) -> Tensor:
    return _dense_loss(*_arguments(w))


def make_compiled() -> Callable[[Workload], Tensor]:
    torch.compiler.reset()  # else it stops compiling after eight shapes
    function = torch.compile(_dense_loss, dynamic=False)
    return lambda w: function(*_arguments(w))


class _VocabParallelKL(torch.autograd.Function):
    """An eager vocab-parallel KL on materialised logits, as training codes have it."""

    @staticmethod
    def forward(ctx, logits, reference, group):
        def log_softmax(x):
            x = x.float()
            largest = x.amax(-1, keepdim=True)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
            x = x - largest
            total = x.exp().sum(-1, keepdim=True)
            torch.distributed.all_reduce(total, group=group)
            return x - total.log()

        log_p, log_t = log_softmax(logits), log_softmax(reference)
        p_t = log_t.exp()
        kl = (p_t * (log_t - log_p)).sum(-1)
        torch.distributed.all_reduce(kl, group=group)
        ctx.save_for_backward(log_p, p_t)
        ctx.dtype = logits.dtype
        return kl

    @staticmethod
    def backward(ctx, grad):
        log_p, p_t = ctx.saved_tensors
        return ((log_p.exp() - p_t) * grad[:, None]).to(ctx.dtype), None, None


def make_candidate() -> Callable[[Workload], Tensor]:
    from benchmarks import candidate  # only here: Triton is optional

    return lambda w: ours(w, backend=candidate)


def halves(w: Workload) -> Tensor:
    """Ours with the weight's gradient summed over two products."""
    return ours(w, chunk_size=w.labels.shape[0] // 2)


def lean(w: Workload) -> Tensor:
    """Ours, in at most a quarter of the memory of `compiled` with the reference on all tokens."""
    return ours(w, chunk_size=w.labels.shape[0] // 4)


def make_megatron() -> Callable[[Workload], Tensor]:
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    group = torch.distributed.group.WORLD

    def step(w: Workload) -> Tensor:
        logits = w.hidden @ w.weight.t()
        # The function writes into fp32 logits: give it a copy, as conversion from bf16 makes one.
        fp32 = logits.to(torch.float32, copy=True)[:, None]
        ce = vocab_parallel_cross_entropy(fp32, w.labels[:, None], 0.0, group)
        loss = _from_cross_entropy(ce[:, 0], w)
        if w.reference_hidden is not None:
            with torch.no_grad():
                t = w.reference_hidden[w.forget :] @ w.reference_weight.t()
            loss = loss + _VocabParallelKL.apply(logits[w.forget :], t, group).mean()
        return loss

    return step


def _liger_kl() -> Callable[[Workload], Tensor]:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    function = LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda w: function(
        w.hidden[w.forget :],
        w.weight,
        w.reference_hidden[w.forget :],
        w.reference_weight,
        None,  # labels: no token is ignored
    )


def make_liger() -> Callable[[Workload], Tensor]:
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    function, kl = LigerFusedLinearCrossEntropyLoss(reduction="none"), _liger_kl()

    def step(w: Workload) -> Tensor:
        loss = _from_cross_entropy(function(w.weight, w.hidden, w.labels), w)
        return loss if w.reference_hidden is None else loss + kl(w)

    return step


def make_cut_cross_entropy() -> Callable[[Workload], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    def step(w: Workload) -> Tensor:
        ce = linear_cross_entropy(w.hidden, w.weight, w.labels, reduction="none")
        loss = _from_cross_entropy(ce, w)
        return loss if w.reference_hidden is None else loss + _liger_kl()(w)

    return step


# Name -> factory. The first is what the others are compared with.
PEERS: dict[str, Callable[[], Callable[[Workload], Tensor]]] = {
    "ours": lambda: ours,
    "ours-terms": lambda: terms,
    "ours-candidate": make_candidate,
    "ours-halves": lambda: halves,
    "ours-lean": lambda: lean,
    "naive": lambda: naive,
    "compiled": make_compiled,
    "megatron": make_megatron,
    "liger": make_liger,
    "cce+liger": make_cut_cross_entropy,
}
