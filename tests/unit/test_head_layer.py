"""The head on Megatron's tensors: their order, whose weight it reads, and when."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_ext.exceptions import ConfigError
from megatron_ext.head import head_loss, head_margins, sequence_major
from tests.helpers import naive

S, B, H, V = 5, 3, 4, 7  # of which the last column is padding


@pytest.fixture
def layer(monkeypatch):
    """An output layer, as far as it is looked at."""
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda: None)
    torch.manual_seed(0)
    found = torch.nn.Linear(H, V, bias=False)
    found.sequence_parallel = False
    return found


@pytest.fixture
def batch():
    """Hidden states `[s, b, H]` and labels `[b, s]`."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(S, B, H, generator=rng), torch.randint(V - 1, (B, S), generator=rng)


def margins(layer, batch, output_weight=None):
    hidden, labels = batch
    arguments = {"output_layer": layer, "output_weight": output_weight, "labels": labels}
    return head_margins(hidden, **arguments, vocab_size=V - 1, fp32_logits=False).detach()


def expected(weight, batch):
    """Token by token, in the order of the head."""
    hidden, labels = batch
    logits = (hidden.double() @ weight.detach().double().T).transpose(0, 1)
    found = naive.target_margin(logits, labels, vocab_size=V - 1)
    return torch.stack([found[b, s] for s in range(S) for b in range(B)]).float()


def test_tokens_are_sequence_major(layer, batch):
    torch.testing.assert_close(margins(layer, batch), expected(layer.weight, batch))
    mask = sequence_major(batch[1])
    assert mask.tolist() == [int(batch[1][b, s]) for s in range(S) for b in range(B)]


def test_a_tied_weight_is_taken_and_not_the_layers(layer, batch):
    tied = torch.nn.Parameter(torch.randn(V, H))
    torch.testing.assert_close(margins(layer, batch, tied), expected(tied, batch))


@pytest.mark.parametrize("with_kwargs", [False, True])
def test_the_weight_is_read_behind_the_hooks(layer, batch, with_kwargs):
    """As DDP's, which waits for the parameters of the last step's update."""
    updated = torch.randn(V, H)

    def gather(module, *_):
        module.weight.data.copy_(updated)

    layer.register_forward_pre_hook(gather, with_kwargs=with_kwargs)
    torch.testing.assert_close(margins(layer, batch), expected(updated, batch))


def test_a_hook_that_changes_what_goes_in_is_refused(layer, batch):
    layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    with pytest.raises(ConfigError, match="Linear: expected forward pre-hooks that leave the inp"):
        margins(layer, batch)


@pytest.mark.parametrize("learns", [True, False])
def test_main_grad_gets_the_gradient_of_a_weight_that_learns(layer, batch, learns):
    layer.weight.requires_grad_(learns)
    layer.weight.main_grad = torch.ones(V, H)
    layer.weight.grad_added_to_main_grad = False
    hidden = batch[0].requires_grad_()
    loss, terms = head_loss(
        hidden,
        lambda margin, kl, places: margin.sum(),
        **{"output_layer": layer, "output_weight": None, "labels": batch[1]},
        vocab_size=V - 1,
    )
    loss.backward()
    torch.testing.assert_close(terms[0], expected(layer.weight, batch))
    assert not terms[1].any()
    weight = layer.weight.detach().double().requires_grad_()
    logits = (hidden.detach().double() @ weight.T).transpose(0, 1)
    naive.target_margin(logits, batch[1], vocab_size=V - 1).sum().backward()
    wanted = 1 + weight.grad.float() if learns else torch.ones(V, H)
    torch.testing.assert_close(layer.weight.main_grad, wanted)
    assert layer.weight.grad_added_to_main_grad is learns
