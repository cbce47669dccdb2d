"""Preprocessing that is stopped, has no room, or finds outputs: nothing half-written, nothing overwritten."""

import resource
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from megatron_ext.data import atomic
from megatron_ext.exceptions import ConfigError, DataError
from tests.helpers.preprocess import run, tool, write_as
from tests.helpers.text import (
    make_texts,
    reference_dataset,
    same_files,
    train_sentencepiece,
    write_jsonl,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("model") / "tokenizer.model")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, model):
    """A limit on the size of files stands for the disk."""
    source = write_as(tmp_path / "a.jsonl", make_texts(60))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            DataError, match=r"o_text_document\.bin .*cannot be written, with .* MiB free"
        ):
            run(model, [source], tmp_path / "o")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [source]


def test_existing_output_needs_overwrite(tmp_path, model):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "the quick"}])
    run(model, [source], tmp_path / "o")
    before = (tmp_path / "o_text_document.bin").read_bytes()
    write_jsonl(tmp_path / "a.jsonl", [{"text": "brown fox jumps"}])
    with pytest.raises(ConfigError, match=r"o_text_document\.bin exists.*--overwrite"):
        run(model, [source], tmp_path / "o")
    assert (tmp_path / "o_text_document.bin").read_bytes() == before
    run(model, [source], tmp_path / "o", overwrite=True)
    expected = reference_dataset(
        tmp_path / "r", [["brown fox jumps"]], model=model, append_eod=False
    )
    assert same_files(tmp_path / "o_text_document", expected)


def test_what_another_run_published_before_the_lock_is_kept(tmp_path, monkeypatch):
    path, opened = tmp_path / "a", atomic._open_locked

    def open_late(path):
        path.write_bytes(b"first")
        return opened(path)

    monkeypatch.setattr(atomic, "_open_locked", open_late)
    with pytest.raises(ConfigError, match="a exists"):
        atomic.write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def interruptible():
    """What a shell runs in the background ignores SIGINT, and so does what it starts in turn."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_run_leaves_no_output(tmp_path, model, how):
    """Stopped at its first sign of progress, some 3% into several seconds of work."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in make_texts(1000) * 30])
    options = ["--workers", "2", "--log-interval", "100", "--tokenizer-backend", "reference"]
    process = tool(model, [source], tmp_path / "o", *options)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    lines = iter(process.stderr.readline, "")
    assert any("documents, " in line for line in lines), "the run ended before it was stopped"
    deadline = time.monotonic() + 60
    assert list(tmp_path.glob("o_*.partial"))
    children = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    process.send_signal(how)
    stderr = process.stderr.read()
    process.wait()
    watchdog.cancel()
    assert not {".bin", ".idx", ".json"} & {p.suffix for p in tmp_path.glob("o_*")}
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert stderr.splitlines()[-1].endswith("interrupted, nothing was written")
        assert not list(tmp_path.glob("o_*"))
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    # What a killed run left behind does not stand in the way of the next.
    result = run(model, [source], tmp_path / "o")
    assert result.manifests[0].documents == 30000
    assert not list(tmp_path.glob("o_*.partial"))
