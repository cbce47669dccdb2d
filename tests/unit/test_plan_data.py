"""The plan refuses data that the run would refuse, too short or of another tokenizer; what is read of it."""

import pytest

from megatron_ext.data.manifest import Manifest, write_manifest
from megatron_ext.exceptions import ConfigError, DataError
from megatron_ext.gpus import GPUS, Cluster
from megatron_ext.planning import flags as entry
from megatron_ext.planning.data import DataTokenizer, check_made_with, check_samples
from megatron_ext.planning.flags import entry_flags
from megatron_ext.planning.plan import plan
from tests.unit.test_plan import write_index
from tests.unit.test_plan_run import MODEL

TOKENIZER = DataTokenizer(vocab_size=500, eod_id=2, digest="a" * 64)
CLUSTER = Cluster(gpus=8, name="H100", gpu=GPUS["H100"], peak_flops=989e12, mfu=0.45)


def signed(prefix, **changes):
    """A data set of 1000 tokens with a manifest of `TOKENIZER`, but for the changes."""
    write_index(prefix, 1000, 10)
    fields = {
        **{"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "tok.model"},
        **{"tokenizer_digest": TOKENIZER.digest, "vocab_size": 500, "eod_id": 2},
        **{"append_eod": True, "dtype": "uint16", "documents": 10, "sequences": 10},
        **{"tokens": 1000, "max_token_id": 0, "skipped": {}, "backend": "reference"},
    }
    write_manifest(prefix, Manifest(**(fields | changes), sources=[]))
    return str(prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"vocab_size": 400}, "of 400 pieces, but the tokenizer given has 500"),
        ({"tokenizer_digest": "b" * 64}, "SHA-256 bbbbbbbbbbbb.*is another one"),
        ({"eod_id": 3}, "end in token id 3, but with the tokenizer in use they end in 2"),
    ],
)
def test_data_of_another_tokenizer(tmp_path, changes, message):
    blend = ["1", signed(tmp_path / "good"), "2", signed(tmp_path / "other", **changes)]
    if message is None:
        check_made_with(blend, TOKENIZER, flag="--data-path")
        return
    with pytest.raises(DataError, match=f"^--data-path: .*other.manifest.json.*{message}"):
        check_made_with(blend, TOKENIZER, flag="--data-path")


def test_several_data_sets_without_weights_are_read_once(tmp_path):
    # 900 tokens of 1000 are trained on: 28 samples of 32 tokens and the one that the last predicts.
    pair = [write_index(tmp_path / name, 1000, 10) for name in "ab"]
    sizes = {"sequence": 32, "split": "90,10,0", "flag": "--forget-data-path"}
    check_samples(pair, wanted=56, **sizes)
    check_samples(pair[:1], wanted=57, **sizes)
    check_samples(["1", pair[0], "1", pair[1]], wanted=57, **sizes)
    with pytest.raises(DataError, match=r"^--forget-data-path: .* least 57 samples .* found 56;"):
        check_samples(pair, wanted=57, **sizes)


def test_a_plan_checks_the_data_of_both_roles(tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "tokenizer", lambda flags: TOKENIZER)
    long, short = write_index(tmp_path / "long", 10**8, 1000), signed(tmp_path / "short")
    split = ("--split", "90,10,0")
    words = [*MODEL, *split, "--train-iters", "10", "--data-path", long, "--forget-data-path"]
    plan(entry_flags([*words, short]), CLUSTER)
    with pytest.raises(DataError, match=r"^--forget-data-path: .* least 1280 samples .* found 0;"):
        plan(entry_flags([*words, short, short]), CLUSTER)
    plan(entry_flags([*words, short, short, "--dataloader-type", "cyclic"]), CLUSTER)
    # Of the last samples a batch is composed, though they fill none.
    samples = [*MODEL, *split, "--train-samples", "2561", "--data-path", long, "--forget-data-path"]
    with pytest.raises(DataError, match=r"^--forget-data-path: .* least 1408 samples"):
        plan(entry_flags([*samples, short, short]), CLUSTER)
    other = signed(tmp_path / "other", vocab_size=400)
    with pytest.raises(DataError, match=r"^--forget-data-path: .* of 400 pieces"):
        plan(entry_flags([*words, other]), CLUSTER)


def test_a_plan_refuses_a_split_without_a_document_or_a_share(tmp_path):
    long, short = (
        write_index(tmp_path / name, 10**5 * documents, documents)
        for name, documents in (("long", 1000), ("short", 402))
    )
    words = [*MODEL, "--train-iters", "10", "--split", "999,1,0", "--data-path", long]
    plan(entry_flags([*words, "--forget-data-path", long]), CLUSTER)
    expected = rf"^--split: expected at least one document of --forget-data-path {short} for the valid split"
    with pytest.raises(DataError, match=f"{expected}, found none of its 402 with shares 999,1,0$"):
        plan(entry_flags([*words, "--forget-data-path", "1", long, "2", short]), CLUSTER)
    whole = ["--forget-data-path", short, "--split", "1,0,0"]
    with pytest.raises(
        ConfigError, match=r"^--split: .* --data-path for validation .*--eval-iters 0$"
    ):
        plan(entry_flags([*words, *whole]), CLUSTER)
    plan(entry_flags([*words, *whole, "--eval-iters", "0"]), CLUSTER)


def test_samples_are_as_many_iterations_as_they_fill(tmp_path):
    data = write_index(tmp_path / "data", 10**8, 1000)
    words = [*MODEL, "--data-path", data, "--save-interval", "4"]
    by_iterations = plan(entry_flags([*words, "--train-iters", "10"]), CLUSTER)
    by_samples = [*words, "--train-samples", str(10 * 256 + 255), "--lr-warmup-samples", "2560"]
    assert plan(entry_flags(by_samples), CLUSTER) == by_iterations
    assert by_iterations["checkpoints"] == 3
