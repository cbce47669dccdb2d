"""A file system without locks, as Lustre is where it was mounted without flock."""

import errno
import fcntl
import json
import logging
import os
from argparse import Namespace

import pytest

from megatron_ext.chat import write_template
from megatron_ext.data.atomic import AtomicFiles, write_atomically
from megatron_ext.data.chat_tokens import load_tokens
from megatron_ext.evaluation.journal import Journal
from megatron_ext.exceptions import DataError
from tests.unit.test_chat_packing import Letters

NAMED = (
    r"^{} cannot be locked \(.*\): .* without flock; mount with -o flock \(localflock locks on one node "
    r"only\), or .*$"
)


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def no_locks(request, monkeypatch):
    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_place_without_locks_is_named_and_nothing_is_left_there(tmp_path, no_locks):
    paths = [tmp_path / "a.bin", tmp_path / "a.idx"]
    with pytest.raises(DataError, match=NAMED.format(tmp_path / "a.bin.partial")):
        AtomicFiles(paths)
    with pytest.raises(DataError, match=NAMED.format(tmp_path / "out.jsonl.progress")):
        Journal(tmp_path / "out.jsonl", settings={})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.partial").write_text("somebody's")
    with pytest.raises(DataError, match=r"a\.partial cannot be locked"):
        write_atomically(tmp_path / "a", b"mine")
    assert (tmp_path / "a.partial").read_text() == "somebody's"


def test_what_is_locked_by_another_is_told_apart(tmp_path):
    with (
        AtomicFiles([tmp_path / "a"]),
        pytest.raises(DataError, match="another run is writing"),
    ):
        AtomicFiles([tmp_path / "a"])


def test_locks_that_do_not_reach_another_node_cost_one_run_and_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    paths = [tmp_path / "a.bin", tmp_path / "a.idx"]
    first = AtomicFiles(paths)
    first[paths[0]].write(b"first")
    second = AtomicFiles(paths)
    second[paths[0]].write(b"second, longer")
    with pytest.raises(DataError, match=r"a\.bin\.partial: .* another run has taken it over"):
        first.commit()
    first.discard()
    assert not any(path.exists() for path in paths)
    second.commit()
    assert paths[0].read_bytes() == b"second, longer"
    third = AtomicFiles(paths, overwrite=True)
    fourth = AtomicFiles(paths, overwrite=True)
    fourth.commit()
    with pytest.raises(DataError, match="taken it over"):
        third.commit()
    third.discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_what_a_killed_run_left_behind_is_taken_over(tmp_path):
    (tmp_path / "a.partial").write_text("half of a longer text")
    write_atomically(tmp_path / "a", b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_the_template_of_a_run_needs_no_lock(tmp_path, no_locks):
    args = Namespace(save=str(tmp_path / "save"), tuned_chat_template="{{ messages }}")
    for _ in "ab":  # a run that goes on writes it again
        write_template(args)
    (file,) = (tmp_path / "save").iterdir()
    assert file.read_text() == "{{ messages }}"
    args.save = str(file)
    with pytest.raises(
        DataError, match=r"chat_template\.jinja cannot be written, with .* MiB free"
    ):
        write_template(args)


def test_conversations_need_no_lock(tmp_path, no_locks, caplog):
    """It saves work alone: files are never replaced there."""
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path.write_text(json.dumps({"messages": turns}))
    tokens = load_tokens(
        [path], Letters(), limit=100, tokenizer_digest="", cache=tmp_path / "cache"
    )
    assert len(tokens.lengths) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "may tokenise the conversations itself" in record.getMessage()
    assert str(tmp_path / "cache" / "chat_") in record.getMessage()
