"""Balancing losses have their coefficients where only some tokens count, by Megatron's own classes."""

from functools import partial

import torch

from tests.helpers.distributed import run_ranks

STEPS = 3  # microbatches of a rank
TOLERANCE = 1e-6  # the same sums in another order, in fp32; 1e-7 was seen


def _gradients(tp: int, *, per_token: bool, scaled: bool) -> dict[str, torch.Tensor]:
    """Of the routers' weights, and of the balancing losses alone; the loss itself counts for nothing."""
    from tests.helpers import models

    models.start(tp)
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_ext.balancing import scale_balancing
    from megatron_ext.plain import summed_loss

    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
    losses = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
    losses |= {"moe_z_loss_coeff": 0.01, "calculate_per_token_loss": per_token}
    cfg = models.config(**experts, **losses, sequence_parallel=tp > 1)
    cfg.finalize_model_grads_func = finalize_model_grads
    model = models.gpt(cfg, native=True)
    wrapped = DistributedDataParallel(cfg, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()
    generator = torch.Generator().manual_seed(1 + parallel_state.get_data_parallel_rank())
    shape = (STEPS, models.BATCH, models.SEQUENCE)
    tokens = torch.randint(models.VOCAB, shape, generator=generator)
    masks = (torch.rand(shape, generator=generator) < 0.3).float()
    positions = torch.arange(models.SEQUENCE).expand(models.BATCH, -1)
    own = zip(tokens, masks, strict=True)

    def forward(_, chunk):
        batch, mask = next(own)
        head = {"labels": batch, "loss_mask": mask, "output_processor": summed_loss}
        return chunk(batch, positions, None, **head), lambda loss: (0 * loss, mask.sum().int(), {})

    schedule = get_forward_backward_func()
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    (partial(scale_balancing, schedule) if scaled else schedule)(
        forward_step_func=forward,
        data_iterator=iter([{"loss_mask": mask} for mask in masks]) if reads else None,
        model=[wrapped],
        num_microbatches=STEPS,
        seq_length=models.SEQUENCE,
        micro_batch_size=models.BATCH,
        forward_only=False,
    )
    return {name: p.main_grad.clone() for name, p in model.named_parameters() if "router" in name}


def _ratios() -> list[tuple[float, float]]:
    """Per layout, how much longer gradients are by Megatron than they should be, and how wrong ours are."""
    found = []
    for tp in (1, 2):
        wanted = _gradients(tp, per_token=False, scaled=False)
        theirs = _gradients(tp, per_token=True, scaled=False)
        ours = _gradients(tp, per_token=True, scaled=True)
        longer = [float(theirs[name].norm() / one.norm()) for name, one in wanted.items()]
        wrong = [float((ours[name] - one).norm() / one.norm()) for name, one in wanted.items()]
        found.append((min(longer), max(wrong)))
    return found


def test_balancing_losses_weigh_the_same_whichever_tokens_are_in_the_loss():
    for rank in run_ranks(_ratios, 2):
        for longer, wrong in rank:
            assert longer > 2  # a third of the tokens counts
            assert wrong < TOLERANCE
