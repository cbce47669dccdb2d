"""torch's fused optimizer kernels in Megatron's slots: same numbers, and slots given back."""

import contextlib
import copy
import types

import pytest
import torch

from megatron_ext.runtime import optimizer as kernels


def _train(optimizer, parameters, steps, *, seed, fused):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if fused:
            assert kernels.use_fused_adam(optimizer)
        optimizer.step()


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (1,))]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_steps_equal_unfused_ones(kind):
    results = []
    for fused in (False, True):
        parameters = [p.requires_grad_() for p in _parameters()]
        optimizer = kind(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        _train(optimizer, parameters, 6, seed=1, fused=fused)
        results.append([p.detach() for p in parameters])
        assert bool(optimizer.param_groups[0].get("fused")) is fused
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def test_a_checkpoint_of_an_unfused_run_goes_on():
    parameters = [p.requires_grad_() for p in _parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    _train(optimizer, parameters, 3, seed=1, fused=False)
    resumed = [p.detach().clone().requires_grad_() for p in parameters]
    other = torch.optim.AdamW(resumed, lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(optimizer, parameters, 3, seed=2, fused=False)
    _train(other, resumed, 3, seed=2, fused=True)
    torch.testing.assert_close(resumed, parameters, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_counter_shared_by_all_parameters_counts_once(fused):
    """Megatron's distributed optimizer loads one tensor for all; untreated it counts thrice."""
    parameters = [p.requires_grad_() for p in _parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    _train(optimizer, parameters, 2, seed=1, fused=False)
    shared = torch.tensor(2.0)
    for state in optimizer.state.values():
        state["step"] = shared
    _train(optimizer, parameters, 4, seed=2, fused=fused)
    counts = {float(state["step"]) for state in optimizer.state.values()}
    assert counts == ({6.0} if fused else {2.0 + 4 * len(parameters)})


def test_other_optimizers_are_left_alone():
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=1.0)
    before = set(optimizer.param_groups[0])
    assert not kernels.use_fused_adam(optimizer)
    assert set(optimizer.param_groups[0]) == before


class GroupAdam(torch.optim.Optimizer):
    """AdamW as Transformer Engine and Apex keep it: the step and a setting of their own in each group."""

    def __init__(self, parameters, lr):
        defaults = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        super().__init__(parameters, defaults | {"bias_correction": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            step = group["step"] = group.get("step", 0) + 1
            assert isinstance(step, int)
            assert group["bias_correction"]
            first, second = group["betas"]
            for p in group["params"]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state = self.state[p] = self.state[p] or zeros
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].lerp_(p.grad**2, 1 - second)
                root = (state["exp_avg_sq"] / (1 - second**step)).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * state["exp_avg"] / (1 - first**step) / root)


def _saved(optimizer):
    """Its state as Megatron's checkpoints without the distributed optimizer hold it."""
    state = copy.deepcopy(optimizer.state_dict())
    steps = [s.pop("step") for s in state["state"].values() if "step" in s]
    if steps:
        state["state"]["common_step"] = steps[0]
    return state


@pytest.mark.parametrize(
    ("first", "second"), [(torch.optim.AdamW, GroupAdam), (GroupAdam, torch.optim.AdamW)]
)
def test_another_kind_of_adam_goes_on_from_a_checkpoint(first, second):
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    parameters = [p.requires_grad_() for p in _parameters()]
    optimizer = first([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=1e-2)
    _train(optimizer, parameters, 3, seed=1, fused=False)
    resumed = [p.detach().clone().requires_grad_() for p in parameters]
    other = second([{"params": resumed[:1]}, {"params": resumed[1:]}], lr=1e-2)
    state = _saved(optimizer)
    kernels.adopt(state, other, step_in_groups=second is GroupAdam)
    if "common_step" in state["state"]:  # what Megatron's load does next
        step = state["state"].pop("common_step")
        MegatronOptimizer._restore_common_per_param_step(state, step)
    other.load_state_dict(state)
    _train(optimizer, parameters, 3, seed=2, fused=False)
    _train(other, resumed, 3, seed=2, fused=False)
    torch.testing.assert_close(resumed, parameters, rtol=0, atol=1e-6)
    # And what it saves in turn has one step, not that of the checkpoint before as well.
    again = _saved(other)
    steps = [again["state"].get("common_step"), *(g.get("step") for g in again["param_groups"])]
    assert {float(step) for step in steps if step is not None} == {6.0}


def test_a_checkpoint_from_before_the_first_step_is_one_to_go_on_from():
    """As of fp16, where each step so far may have been skipped."""
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    fresh, resumed = ([p.requires_grad_() for p in _parameters()] for _ in "ab")
    optimizer, other = (torch.optim.AdamW(parameters, lr=1e-2) for parameters in (fresh, resumed))
    kernels.begin(optimizer)
    state = _saved(optimizer)
    assert all(not s["exp_avg"].any() for s in state["state"].values() if isinstance(s, dict))
    del state["state"]["common_step"]  # Megatron leaves out a step of 0
    kernels.adopt(state, other, step_in_groups=False)
    MegatronOptimizer._restore_common_per_param_step(state, state["state"].pop("common_step"))
    other.load_state_dict(state)
    plain = [p.detach().clone().requires_grad_() for p in fresh]
    _train(torch.optim.AdamW(plain, lr=1e-2), plain, 3, seed=1, fused=False)
    for parameters, each in ((fresh, optimizer), (resumed, other)):
        _train(each, parameters, 3, seed=1, fused=False)
        torch.testing.assert_close(parameters, plain, rtol=0, atol=0)


def test_the_distributed_optimizers_groups_get_a_step_that_counts_in_whole_numbers():
    """Megatron writes torch's step, a float, into the groups; the kernels of others take integers only."""
    other = GroupAdam([torch.zeros(2, requires_grad=True)], lr=1e-2)
    state = {"param_groups": [{"lr": 0.5, "step": 3.0}, {"lr": 0.25, "step": 3.0}]}
    kernels.adopt(state, other, step_in_groups=True)
    for group, rate in zip(state["param_groups"], (0.5, 0.25), strict=True):
        assert (group["lr"], group["step"], group["bias_correction"]) == (rate, 3, True)
        assert isinstance(group["step"], int)
    untouched = {"param_groups": [{"lr": 0.5}]}  # before the first step there is none
    kernels.adopt(untouched, other, step_in_groups=True)
    assert untouched == {"param_groups": [{"lr": 0.5}]}


@pytest.mark.parametrize("of", [torch.optim.AdamW, GroupAdam])
@pytest.mark.parametrize("distributed", [False, True])
def test_each_optimizer_of_megatron_looks_for_the_step_where_it_is(monkeypatch, distributed, of):
    """The distributed one hands torch's Adam the step of the groups by itself."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    kind = distrib_optimizer.DistributedOptimizer if distributed else optimizer.FP32Optimizer
    seen = []
    monkeypatch.setattr(kind, "load_state_dict", lambda self, state: seen.append(state))
    monkeypatch.setattr(
        kernels, "adopt", lambda state, _, step_in_groups: seen.append(step_in_groups)
    )
    saved = {"param_groups": []}
    with contextlib.ExitStack() as undo:
        kernels._share_checkpoints(undo)
        ours = types.SimpleNamespace(optimizer=of(_parameters(), lr=1e-2))
        kind.load_state_dict(ours, {"optimizer": saved})
    assert seen == [distributed or of is GroupAdam, {"optimizer": saved}]


def test_adam_is_fused_once_and_again_after_a_load(monkeypatch):
    from megatron.core.optimizer.optimizer import FP32Optimizer

    fuse, seen = kernels.use_fused_adam, []
    monkeypatch.setattr(kernels, "use_fused_adam", lambda o: seen.append(fuse(o)))
    monkeypatch.setattr(FP32Optimizer, "load_state_dict", lambda self, state: None)
    parameters = [p.requires_grad_() for p in _parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    undo = kernels.enable()
    try:
        _train(optimizer, parameters, 3, seed=1, fused=False)
        assert seen == [True]
        ours = types.SimpleNamespace(optimizer=optimizer)
        FP32Optimizer.load_state_dict(ours, _saved(optimizer))
        _train(optimizer, parameters, 2, seed=1, fused=False)
        assert seen == [True, True]
    finally:
        undo()


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_asks_a_checkpoint_for_what_it_has_saved(momentum, monkeypatch):
    from megatron.core.optimizer.optimizer import FP32Optimizer

    # As Megatron's begins when it loads.
    monkeypatch.setattr(
        FP32Optimizer,
        "sharded_state_dict",
        lambda self, *_: self.init_state_fn(self.optimizer, None) or {"state": {}},
    )
    parameters = [p.requires_grad_() for p in _parameters()]
    saved, new = (torch.optim.SGD(parameters, lr=1e-2, momentum=momentum) for _ in range(2))
    _train(saved, parameters, 1, seed=1, fused=False)
    undo = kernels.enable()
    FP32Optimizer.sharded_state_dict(
        types.SimpleNamespace(init_state_fn=None, optimizer=new), {}, True
    )
    undo()
    found, wanted = new.state_dict()["state"], saved.state_dict()["state"]
    assert {i: state.keys() for i, state in found.items()} == {
        i: state.keys() for i, state in wanted.items() if momentum
    }


def test_norm_and_scale_equal_plain_ones():
    tensors = [t * 10.0**i for i, t in enumerate([*_parameters(), torch.zeros(0)])]
    exact = torch.cat([t.flatten() for t in tensors]).double().norm()
    norm, nothing = kernels.l2_norm(0, torch.zeros(1), [tensors], False)
    assert norm.shape == (1,)
    assert nothing is None
    torch.testing.assert_close(norm[0].double(), exact, rtol=1e-6, atol=0)

    expected = [t * 0.25 for t in tensors]
    targets = [torch.full_like(t, torch.nan) for t in tensors]
    kernels.scale(0, torch.zeros(1), [tensors, targets], 0.25)
    torch.testing.assert_close(targets, expected)
    kernels.scale(0, torch.zeros(1), [tensors, tensors], 0.25)
    torch.testing.assert_close(tensors, expected)
    kernels.scale(0, torch.zeros(1), [[], []], 0.25)


def test_norm_of_half_precision_gradients_is_not_rounded_to_their_type():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator).bfloat16() for n in (1000, 37)]
    exact = torch.cat(tensors).double().norm()
    norm, _ = kernels.l2_norm(0, torch.zeros(1), [tensors], False)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm[0].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_of_microbatches_are_summed(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 3), (6, 5)) * 2
    inputs, first, more, second = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    expected = second.T.double() @ more.double() + first.T.double() @ inputs.double()
    for name, sums in (("fp32", torch.float32), ("fp16", dtype)):
        total = torch.zeros(5, 3, dtype=sums)
        for given in ((inputs, first), (more, second)):
            getattr(kernels._WeightGradient, f"wgrad_gemm_accum_{name}")(*given, total)
        bound = 1e-6 if sums == torch.float32 else 2e-2
        torch.testing.assert_close(total.double(), expected, rtol=bound, atol=bound)
