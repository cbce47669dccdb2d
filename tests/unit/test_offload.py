import pytest
import torch
from torch import nn

from megatron_ext.runtime.offload import HostWeights, to_host

CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


@pytest.mark.parametrize("device", DEVICES)
def test_weights_visit_the_device_and_leave_nothing_there(device):
    module = nn.Linear(512, 512).to(device).requires_grad_(False)
    x = torch.randn(4, 512, device=device)
    expected = module(x)
    before = [p.data for p in module.parameters()]
    host = HostWeights(module.parameters())
    away = [p.data_ptr() for p in module.parameters()]
    del before
    for _ in range(2):
        with host.on_device():
            assert torch.equal(module(x), expected)
            assert all(p.device.type == device for p in module.parameters())
            # A visit is a copy: writing it must not reach the host's weights.
            for p in module.parameters():
                p.data.zero_()
        assert [p.data_ptr() for p in module.parameters()] == away
        assert all(p.device.type == "cpu" for p in module.parameters())


def test_an_error_during_the_visit_ends_it():
    module = nn.Linear(3, 3).requires_grad_(False)
    host = HostWeights(module.parameters())
    away = [p.data_ptr() for p in module.parameters()]
    with pytest.raises(RuntimeError, match="stop"), host.on_device():
        raise RuntimeError("stop")
    assert [p.data_ptr() for p in module.parameters()] == away


def test_parameters_that_learn_are_refused():
    with pytest.raises(AssertionError, match="frozen"):
        HostWeights(nn.Linear(2, 2).parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_memory_is_free_between_visits():
    module = nn.Linear(4096, 4096, device="cuda").requires_grad_(False)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    present = torch.cuda.memory_allocated()
    host = HostWeights(module.parameters())
    assert torch.cuda.memory_allocated() <= present - size
    with host.on_device():
        assert torch.cuda.memory_allocated() >= present - size // 100
    assert torch.cuda.memory_allocated() <= present - size


@pytest.mark.parametrize("device", DEVICES)
def test_a_host_copy_comes_back_unchanged_and_shares_no_memory(device):
    hidden = torch.randn(7, 3, device=device).transpose(0, 1)
    expected = hidden.clone()
    host = to_host(hidden)
    hidden.zero_()
    assert host.device.type == "cpu"
    assert host.is_pinned() == (device == "cuda")
    assert torch.equal(host.to(device, non_blocking=True), expected)
