"""The head's kernels against fp64 of the same logits, next to the error of plain fp32 torch.

Errors as the project states its precision: margins relative, the KL relative to max(KL, 1e-3),
gradients relative to the L1 norm of the row, before their rounding to the type of the logits.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from megatron_ext.losses import vocab_parallel

# Tokens, columns, real columns, spread of the logits, distance of the reference, margins forced.
CASES = (
    (64, 131072, 131072, 2.0, 0.1, False),
    (64, 131072, 131072, 2.0, 0.001, False),
    (64, 131072, 128003, 8.0, 1.0, True),
    (33, 50257, 50257, 2.0, 0.01, True),
    (5, 11, 11, 3.0, 3.0, True),
    (7, 4097, 4096, 1.0, 0.1, False),
)


def accuracy(device: str) -> list[dict[str, Any]]:
    """One row a case and way of computing: the largest error of values and gradients."""
    ways: list[tuple[str, Any]] = [("torch", vocab_parallel)]
    if device == "cuda":
        from benchmarks import candidate
        from megatron_ext.losses import head_triton

        ways += [("triton", head_triton), ("candidate", candidate)]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        for case in CASES:
            tokens, columns, valid, spread, distance, forced = case
            torch.manual_seed(columns)
            z = (torch.randn(tokens, columns, device=device) * spread).to(dtype)
            t = (z + distance * torch.randn(tokens, columns, device=device)).to(dtype)
            labels = torch.randint(valid, (tokens,), device=device)
            if forced:  # margins from far below to far above what an fp32 softmax can hold
                rest = torch.logsumexp(z[:, :valid].float(), -1)
                wanted = rest + torch.linspace(-60, 120, tokens, device=device)
                z.scatter_(1, labels[:, None], wanted[:, None].to(dtype))
            truth = _exact(z, t, labels, valid)
            row = {"case": f"{str(dtype)[6:]} {case}"}
            for name, kernels in ways:
                row[name] = _errors(_ours(kernels, z, t, labels, valid), truth)
            row["plain fp32"] = _errors(_plain(z, t, labels, valid), truth)
            results.append(row)
    return results


Result = tuple[Tensor, Tensor, Tensor, Tensor]  # margin, KL, gradient of each


def _exact(z: Tensor, t: Tensor, labels: Tensor, valid: int) -> Result:
    """In fp64 by autograd, from the definitions."""
    z64 = z[:, :valid].double().requires_grad_()
    t64 = t[:, :valid].double()
    here = F.one_hot(labels, valid).bool()
    rest = torch.logsumexp(z64.masked_fill(here, -torch.inf), -1)
    margin = z64.gather(1, labels[:, None])[:, 0] - rest
    log_t, log_p = F.log_softmax(t64, -1), F.log_softmax(z64, -1)
    kl = (log_t.exp() * (log_t - log_p)).sum(-1)
    (d_margin,) = torch.autograd.grad(margin.sum(), z64)
    return margin.detach(), kl.detach(), d_margin, (log_p.exp() - log_t.exp()).detach()


def _ours(kernels: Any, z: Tensor, t: Tensor, labels: Tensor, valid: int) -> Result:
    columns = {"vocab_start": 0, "valid_columns": valid}
    stats = kernels.shard_statistics(z, labels, reference_logits=t, **columns)
    rows = kernels.combine_statistics(stats[None])
    ones = torch.ones(z.shape[0], device=z.device)
    poison = torch.full_like(z, torch.nan, dtype=torch.float32)
    d_margin = kernels.logits_gradient(z, labels, rows, ones, None, out=poison.clone(), **columns)
    d_kl = kernels.logits_gradient(
        z, labels, rows, None, ones, reference_logits=t, out=poison, **columns
    )
    padding = torch.cat([d_margin[:, valid:], d_kl[:, valid:]])
    assert padding.numel() == 0 or (padding == 0).all()
    return rows.margin, rows.kl, d_margin[:, :valid], d_kl[:, :valid]


def _plain(z: Tensor, t: Tensor, labels: Tensor, valid: int) -> Result:
    """The same definitions as one writes them in fp32."""
    z32 = z[:, :valid].float().requires_grad_()
    log_p = F.log_softmax(z32, -1)
    log_t = F.log_softmax(t[:, :valid].float(), -1)
    label = log_p.gather(1, labels[:, None])[:, 0]
    margin = label - torch.log1p(-label.exp())
    kl = F.kl_div(log_p, log_t, log_target=True, reduction="none").sum(-1)
    (d_margin,) = torch.autograd.grad(margin.sum(), z32, retain_graph=True)
    (d_kl,) = torch.autograd.grad(kl.sum(), z32)
    return margin.detach(), kl.detach(), d_margin, d_kl


def _errors(found: Result, truth: Result) -> dict[str, float]:
    margin, kl, d_margin, d_kl = (x.double() for x in found)

    def row_error(got: Tensor, want: Tensor) -> float:
        return ((got - want).abs().sum(-1) / want.abs().sum(-1)).max().item()

    return {
        "margin": ((margin - truth[0]).abs() / truth[0].abs().clamp(min=1)).max().item(),
        "kl": ((kl - truth[1]).abs() / truth[1].clamp(min=1e-3)).max().item(),
        "d margin": row_error(d_margin, truth[2]),
        "d kl": row_error(d_kl, truth[3]),
    }


def show(results: list[dict[str, Any]]) -> None:
    """Prints margin | KL | d margin | d KL errors of each way."""
    for row in results:
        print(row["case"])
        for name, errors in row.items():
            if name != "case":
                numbers = "  ".join(f"{key} {value:.1e}" for key, value in errors.items())
                print(f"    {name:<12} {numbers}")
