"""Data sets on a disk that fails, or of somebody else: named, and the others are looked at."""

import errno
import os
from argparse import Namespace
from pathlib import Path

import pytest

from tests.helpers.preprocess import run, write_as
from tests.helpers.text import make_texts, train_sentencepiece
from tools import verify_data


class Failing:
    """A file on a disk that fails."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read(self, _):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def prefixes(tmp_path):
    model = train_sentencepiece(tmp_path / "t.model")
    source = write_as(tmp_path / "a.jsonl", make_texts(5))
    return [run(model, [source], tmp_path / name).prefixes[0] for name in ("bad", "good")]


def test_a_file_that_cannot_be_read(prefixes, monkeypatch, capsys):
    opened = Path.open

    def open_file(path, *words, **named):
        return Failing() if str(path) == f"{prefixes[0]}.bin" else opened(path, *words, **named)

    monkeypatch.setattr(Path, "open", open_file)
    assert verify_data.check_sets(Namespace(prefix=prefixes), None) == 1
    bad, good = capsys.readouterr().out.splitlines()
    assert bad == f"BAD {prefixes[0]}.bin cannot be read: [Errno 5] Input/output error"
    assert good.startswith(f"ok  {prefixes[1]}: ")


def test_a_file_that_may_not_be_opened(prefixes, monkeypatch, capsys):
    def verify(prefix, **_):
        raise PermissionError(errno.EACCES, "Permission denied", f"{prefix}.idx")

    monkeypatch.setattr(verify_data, "verify", verify)
    assert verify_data.check_sets(Namespace(prefix=prefixes), None) == 2
    assert f"BAD {prefixes[1]}: [Errno 13] Permission denied" in capsys.readouterr().out
