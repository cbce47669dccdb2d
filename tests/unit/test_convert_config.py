"""A config that an export writes says the same to `transformers` 5 and to the versions before it."""

import json

import pytest
import torch
from transformers import AutoConfig

from megatron_ext.conversion.from_huggingface import import_model
from megatron_ext.conversion.llama import LlamaLike
from megatron_ext.conversion.rotation import LLAMA3_ROPE
from megatron_ext.conversion.to_huggingface import export_model
from tests.helpers import llama

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
CASES = {
    "llama": {"rope_parameters": ROPE},
    "llama3": {"rope_parameters": llama.LLAMA3, "max_position_embeddings": 131072},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_parameters": ROPE},
    "qwen3_moe": llama.CASES["qwen3_moe"] | {"rope_parameters": ROPE},
}


@pytest.mark.parametrize("name", CASES)
def test_a_config_that_is_rewritten_has_the_keys_of_before(name, tmp_path):
    source = llama.save(tmp_path / "source", **CASES[name])
    import_model(source, tmp_path / "megatron")
    export_model(tmp_path / "megatron", tmp_path / "back", dtype=torch.bfloat16)
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    rope = CASES[name]["rope_parameters"]
    assert (fields["dtype"], fields["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == rope["rope_theta"]
    old = {"rope_type": "llama3", "factor": 4.0, **LLAMA3_ROPE} if name == "llama3" else None
    assert fields.get("rope_scaling") == old
    expected, found = (AutoConfig.from_pretrained(tmp_path / f) for f in ("source", "back"))
    assert found.dtype == torch.bfloat16
    assert found.rope_parameters == expected.rope_parameters
    assert LlamaLike.from_config(found) == LlamaLike.from_config(expected)
    # The old keys by themselves are read as the same.
    for key in ("rope_parameters", "dtype"):
        del fields[key]
    (tmp_path / "back" / "config.json").write_text(json.dumps(fields))
    alone = AutoConfig.from_pretrained(tmp_path / "back")
    assert (alone.dtype, alone.rope_parameters) == (torch.bfloat16, expected.rope_parameters)
