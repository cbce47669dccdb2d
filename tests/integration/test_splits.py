"""Data sets named for each split: training reads one pair of them, validation another."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from tests.helpers import naive_gpt
from tests.helpers.entry import METRICS, Launch
from tests.helpers.tiny import BATCH, FORGET, SEQUENCE, VOCAB

EVALUATIONS = 2
SPEC = SimpleNamespace(
    **{"batch": BATCH, "forget": FORGET, "sequence": SEQUENCE, "split": None, "eod": 2},
    **{"heads": 4, "groups": 2, "vocab": VOCAB, "forget_loss": "bounded"},
)


def part(prefix, documents, target):
    """A data set of some documents of another."""
    source = IndexedDataset(str(prefix))
    builder = IndexedDatasetBuilder(f"{target}.bin", dtype=np.uint16)
    for index in range(len(source))[documents]:
        builder.add_document(torch.from_numpy(source[index].astype(np.int64)), [len(source[index])])
    builder.finalize(f"{target}.idx")
    return target


@pytest.fixture(scope="module")
def parts(tiny, tmp_path_factory):
    """By side and split, the prefix of a data set; no document is in two of them."""
    directory = tmp_path_factory.mktemp("splits")
    cuts = {"train": slice(0, -200), "valid": slice(-200, None)}
    return {
        side: {
            split: part(prefix, cut, directory / f"{side}_{split}") for split, cut in cuts.items()
        }
        for side, prefix in (("forget", tiny.forget), ("replay", tiny.replay))
    }


@pytest.fixture(scope="module")
def losses(tiny, server, parts, runs_directory):
    """One step that learns nothing, and validation."""
    forget, replay = parts["forget"], parts["replay"]
    flags = tiny.flags(
        *("--train-data-path", replay["train"], "--valid-data-path", replay["valid"]),
        *("--forget-train-data-path", forget["train"], "--forget-valid-data-path", forget["valid"]),
        *("--forget-batch-size", FORGET, "--forget-weight", 0.5, "--replay-weight", 0.7),
        *("--mitigation-weight", 1.3, "--load", tiny.base, "--finetune"),
        *("--reference-load", tiny.reference, "--train-iters", 1, "--eval-iters", EVALUATIONS),
        *("--lr", 1e-12, "--min-lr", 0),
    )
    return server.run_all({"splits": Launch(flags)}, runs_directory / "splits")["splits"]


@pytest.fixture(scope="module")
def naive(tiny, parts):
    """The same by the definitions: for each split the mean of each term over all of its batches."""
    batches = {"train": 1, "valid": EVALUATIONS}
    sides = [
        naive_gpt.samples(
            str(parts[side]["train"]),
            [count * n for n in batches.values()],
            SPEC,
            valid=str(parts[side]["valid"]),
        )
        for side, count in (("forget", FORGET), ("replay", BATCH - FORGET))
    ]
    models = [naive_gpt.load_weights(str(directory)) for directory in (tiny.base, tiny.reference)]
    result = {}
    for split, forget, replay in zip(batches, *sides, strict=True):
        read = [naive_gpt.global_batch(forget, replay, i, SPEC) for i in range(batches[split])]
        batch = {name: torch.cat([one[name] for one in read]) for name in read[0]}
        result[split] = naive_gpt.means(naive_gpt.token_terms(*models, batch, SPEC), batch)
    return result


def test_training_and_validation_read_different_data(naive):
    for tag, value in naive["train"].items():
        assert abs(naive["valid"][tag] / value - 1) > 1e-3, tag


@pytest.mark.parametrize(("split", "suffix"), [("train", ""), ("valid", " validation")])
def test_each_split_reads_its_own_data(naive, losses, split, suffix):
    for tag, value in naive[split].items():
        # fp32 against fp64.
        assert losses.scalars[f"{tag}{suffix}"][1] == pytest.approx(value.item(), rel=1e-5), tag


def test_validation_logs_every_term(losses):
    for tag in METRICS:
        assert len(losses.series(f"{tag} validation")) == 1
