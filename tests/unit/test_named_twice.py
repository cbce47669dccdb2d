"""A data set that is named twice in one blend is read twice, sample by sample."""

import logging
from argparse import Namespace

import pytest
from megatron.core.datasets.utils import Split

from megatron_ext.config import UnlearnConfig
from megatron_ext.data import checks
from megatron_ext.data.manifest import Manifest, write_manifest
from megatron_ext.exceptions import ConfigError
from tests.helpers.text import write_dataset

SHARES = {Split.train: (0, 0.9), Split.valid: (0.9, 1), Split.test: None}


@pytest.fixture
def data(tmp_path):
    """Prefixes: first, its copy at another path, a link to it, and two with other content."""
    for name, content in (("first", "x"), ("copy", "x"), ("other", "y"), ("old", None)):
        write_dataset(tmp_path / name, [[2, 3]] * 20)
        manifest = Manifest(
            tokenizer_type="t",
            tokenizer_model="t.model",
            tokenizer_digest="d",
            vocab_size=10,
            eod_id=2,
            append_eod=True,
            dtype="uint16",
            documents=20,
            sequences=20,
            tokens=40,
            max_token_id=3,
            skipped={},
            backend="reference",
            sources=[],
            content_digest=content,
        )
        write_manifest(tmp_path / name, manifest)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(tmp_path / f"first{suffix}")
    return lambda *names: [str(tmp_path / name) for name in names]


def check(monkeypatch, *blends):
    """The checks of a run whose blends have these prefixes."""
    named = [checks._NamedBlend(f"--flag{i}", (b, None), SHARES) for i, b in enumerate(blends)]
    monkeypatch.setattr(checks, "_check_lists", lambda _: None)
    monkeypatch.setattr(checks, "_replay_named", lambda _: named)
    monkeypatch.setattr(
        checks, "get_tokenizer", lambda: Namespace(vocab_size=10, eod=2, unique_identifiers={})
    )
    args = Namespace(
        **{"mock_data": False, "eval_iters": 1, "skip_train": False, "rank": 0, "split": "90,10"},
        **{"mmap_bin_files": True, "dataloader_inter_document_masking": False},
    )
    args.tokenizer_digest, args.per_dataset_sequences_path = "d", None
    checks.check_datasets(args, UnlearnConfig())


def test_the_same_file_twice_in_a_blend_is_refused(data, monkeypatch):
    first, other, link = data("first", "other", "link")
    with pytest.raises(ConfigError, match=rf"^--flag0: .* once, found {first} twice: the same"):
        check(monkeypatch, [first, other, first])
    with pytest.raises(ConfigError, match=rf"found {link} twice, also as {first}: the same"):
        check(monkeypatch, [first, link])


def test_copies_in_a_blend_are_told(data, monkeypatch, caplog):
    check(monkeypatch, data("first", "other", "copy", "old"))
    first, copy = data("first", "copy")
    (line,) = caplog.messages
    assert line.startswith(f"--flag0 {copy}: the same content as {first}, so")
    assert caplog.records[0].levelno == logging.WARNING


def test_other_blends_may_hold_the_same(data, monkeypatch, caplog):
    """To train and to validate on, or, where it is allowed, to forget and to replay."""
    check(monkeypatch, data("first", "other"), data("first"), data("copy", "old"))
    assert caplog.messages == []
