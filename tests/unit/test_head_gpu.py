"""The head on a GPU at sizes that an interpreter never sees."""

import pytest
import torch

from megatron_ext.losses import unlearning_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_logits_beyond_32_bits_are_those_of_two_halves():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    tokens, columns, width = 16_448, 131_072, 64  # 2.16e9 logits, and as many of the reference
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape):
        made = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        return made.requires_grad_()

    hidden, weight = normal(tokens, width), normal(columns, width)
    reference = {"reference_hidden": normal(tokens, width), "reference_weight": weight.detach()}
    labels = torch.randint(0, columns, (tokens,), generator=generator, device="cuda")
    found = []
    for chunk_size in (tokens, tokens // 2):
        margin, kl = unlearning_head(
            *(hidden, weight, labels, torch.ones_like(labels)),
            **reference,
            chunk_size=chunk_size,
        )
        gradients = torch.autograd.grad(margin.sum() + kl.sum(), (hidden, weight))
        found.append((margin.detach(), kl.detach(), *gradients))
    (margin, kl, *gradients), (margin_of_halves, kl_of_halves, *gradients_of_halves) = found
    torch.testing.assert_close(margin, margin_of_halves, rtol=1e-6, atol=0)
    torch.testing.assert_close(kl, kl_of_halves, rtol=1e-5, atol=1e-5)
    # bf16: one rounding of each element apart, since a half of dW is added to the other.
    for whole, halves in zip(gradients, gradients_of_halves, strict=True):
        torch.testing.assert_close(whole, halves, rtol=2**-6, atol=2**-6 * whole.abs().max().item())
