"""A folder that is no model, or whose files cannot be opened, is named with what is wrong with it."""

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_ext.conversion import from_huggingface
from megatron_ext.conversion.safetensors import SafetensorsReader
from megatron_ext.exceptions import CheckpointError
from tests.helpers import llama

NEEDED = (
    "expected the folder of a Hugging Face model, such as `hf download NAME --local-dir FOLDER` makes of a "
    "name on the hub, found "
)


@pytest.mark.parametrize("name", ["none", "meta-llama/Llama-3.2-1B"])
def test_a_source_is_a_folder_and_no_name_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        from_huggingface.import_model(Path(name), tmp_path / "output")
    assert str(refused.value) == f"--source {name}: {NEEDED}no folder"
    Path(name).mkdir(parents=True)
    with pytest.raises(CheckpointError) as refused:
        from_huggingface.import_model(Path(name), tmp_path / "output")
    assert str(refused.value) == f"--source {name}: {NEEDED}no config.json in it"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "hidden_size",
            64,
            r": expected model\.embed_tokens\.weight of shape \(500, 64\), as config",
        ),
        ("num_key_value_heads", 3, r"/config\.json: num_key_value_heads: expected a divisor of"),
    ],
)
def test_a_config_of_other_weights_is_named_with_its_folder(field, value, message, tmp_path):
    source = llama.save(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=f"^{source}{message}"):
        from_huggingface.import_model(source, tmp_path / "output")


def test_weights_that_cannot_be_opened_are_not_called_missing(tmp_path):
    index = {"weight_map": {"model.norm.weight": "loop.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    with pytest.raises(
        CheckpointError, match=f"weights cannot be read: .*{os.strerror(errno.ELOOP)}.*{loop}"
    ):
        SafetensorsReader(tmp_path)
