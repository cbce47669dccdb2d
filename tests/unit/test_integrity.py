"""``--verify-integrity``: hashes of a checkpoint's files are written and read by Megatron."""

import json

import pytest
from megatron.core.dist_checkpointing import serialization

from megatron_ext.exceptions import CheckpointError
from megatron_ext.runtime import resume


def test_hashes_are_verified_where_they_were_saved(tmp_path, monkeypatch, caplog):
    """With --verify-integrity; a checkpoint of before has none."""
    verify = serialization.verify_integrity_manifest
    monkeypatch.setattr(serialization, "verify_integrity_manifest", verify)
    resume.verify_what_can_be()
    serialization.verify_integrity_manifest(str(tmp_path))
    assert f"--verify-integrity: {tmp_path} was saved without this flag" in caplog.text
    manifest = {"algorithm": "sha256", "files": {"weights": "0" * 64}}
    (tmp_path / "integrity.json").write_text(json.dumps(manifest))
    (tmp_path / "weights").write_bytes(b"damaged")
    with pytest.raises(
        CheckpointError, match=r"^--verify-integrity: (.|\n)*weights: hash mismatch"
    ):
        serialization.verify_integrity_manifest(str(tmp_path))
