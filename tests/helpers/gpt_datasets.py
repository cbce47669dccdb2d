"""Megatron's GPT datasets over small data sets, without a run."""

import itertools
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.utils import Split

SEQUENCE = 16


class FakeTokenizer:
    """As much of one as a dataset asks for; made again it looks the same."""

    vocab_size, eod, pad, eos = 1000, 0, 1, 0
    unique_identifiers = {"class": "FakeTokenizer"}  # noqa: RUF012


def documents(seed, *, count=50, tokens=2000):
    """Documents of uneven lengths, of the same number of tokens in all, whatever the seed."""
    random = np.random.default_rng(seed)
    bounds = [0, *sorted(random.choice(np.arange(1, tokens), count - 1, replace=False)), tokens]
    ids = random.integers(2, 1000, tokens)
    return [ids[a:b] for a, b in itertools.pairwise(bounds)]


def dataset_config(prefixes, weights, cache, **more):
    """Of one epoch and no split."""
    blend = (list(map(str, prefixes)), weights)
    options = {"random_seed": 1, "sequence_length": SEQUENCE, "split": "1", "blend": blend} | more
    return GPTDatasetConfig(
        path_to_cache=None if cache is None else str(cache),
        tokenizer=FakeTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **options,
    )


def dataset(of, prefix, cache, *, samples=100, **more):
    """The training split of one data set."""
    config = dataset_config([prefix], None, cache, **more)
    data = of.build_low_level_dataset(str(prefix), config)
    indices = np.arange(len(data.sequence_lengths), dtype=np.int32)
    return of(data, str(prefix), indices, samples, Split.train, config)


def files(folder):
    """By name, when each file of a cache was last written."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}
