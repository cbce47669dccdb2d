"""Attention within documents in Megatron's self-attention, which Transformer Engine's layers are of.

Its projections are Megatron's local ones and its attention a stand-in: Transformer Engine itself needs a GPU.
"""

import pytest
import torch

from tests.helpers.distributed import run_ranks
from tests.helpers.thd import ThdAttention

CASES = {
    "grouped queries": {},
    "query and key norm": {"qk_layernorm": True},
    "layers without rotation": {"no_rope_freq": [1, 0]},
    "core attention recomputed": {
        **{"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    },
    "all recomputed": {
        **{"recompute_granularity": "full", "recompute_method": "uniform"},
        "recompute_num_layers": 1,
    },
}


def _compare(case: dict) -> tuple[float, float, float]:
    """Differences of loss and gradients; and how far attention across documents is away."""
    from megatron_ext.model.documents import Documents
    from megatron_ext.model.te_documents import WithinDocuments
    from tests.helpers import models

    class Within(WithinDocuments, ThdAttention):
        pass

    lengths = torch.full((models.BATCH, models.SEQUENCE + 1), models.SEQUENCE, dtype=torch.int32)
    lengths[:, 0] = 0
    lengths[0, 1:3], lengths[1, 1:2] = torch.tensor([3, 11]), torch.tensor([8])
    documents = Documents.from_lengths(lengths)
    config = models.config(**case)
    native = models.gpt(config, native=True)
    other = models.gpt(config, native=False, core_attention=Within)
    native.load_state_dict(other.state_dict())
    loss, gradients = models.loss_and_gradients(other, documents=documents)
    expected, theirs = models.loss_and_gradients(native, documents=documents)
    worst = max(float((gradients[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)
    across = models.loss_and_gradients(native)[0]
    return abs(loss - expected), worst, abs(across - expected)


def _everything() -> dict:
    from megatron_ext.runtime import compat, recompute
    from tests.helpers import models

    compat.read_sizes_and_types()
    recompute.return_copies()
    results = {}
    for tensor_parallel in (1, 2):
        models.start(tensor_parallel)
        for name, case in CASES.items():
            results[f"{name}, {tensor_parallel}"] = _compare(case)
    return results


@pytest.fixture(scope="module")
def results():
    return run_ranks(_everything, 2, timeout=300.0)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_torch_native_layers(results, name, tensor_parallel):
    for rank in results:
        loss, gradients, across = rank[f"{name}, {tensor_parallel}"]
        # fp32 sums in another order.
        assert loss < 2e-6
        assert gradients < 1e-5
        assert across > 1e-3
