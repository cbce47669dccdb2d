"""Shares of `--split`, read without Megatron as Megatron reads them, and what is refused of them."""

from argparse import Namespace

import pytest
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from megatron_ext.data.shares import check_documents, needed_splits, split_shares
from megatron_ext.exceptions import ConfigError, DataError


@pytest.mark.parametrize(
    "split",
    ["999,1,0", "969,30,1", "1", "90,10", "0.7,0.2,0.1", "1,0,3", "0,100,0", " 98, 1 ,1", "3 2 .5"],
)
def test_bounds_are_megatron_s_to_the_bit(split):
    expected = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    assert list(split_shares(split).values()) == expected


@pytest.mark.parametrize("split", ["most", "0,0,0", "1,2,3,4", "1.2.3,1"])
def test_what_is_no_split_is_refused(split):
    with pytest.raises(ConfigError, match=rf"^--split: expected .*, found {split}$"):
        split_shares(split)


def test_every_share_must_hold_a_document():
    # Python rounds halves to even, as Megatron does: 0.999 of 500 documents are 500, of 501 they are 500.
    shares = split_shares("999,1,0")
    check_documents("x", 501, shares, flag="--data-path", split="999,1,0")
    expected = (
        "--split: expected at least one document of --data-path x for the valid split, found none of its "
        "402 with shares 999,1,0"
    )
    with pytest.raises(DataError, match=f"^{expected}$"):
        check_documents("x", 402, shares, flag="--data-path", split="999,1,0")


def test_a_run_needs_the_splits_that_it_reads():
    assert set(needed_splits(Namespace(skip_train=False, eval_iters=1))) == {"train", "valid"}
    assert set(needed_splits(Namespace(skip_train=True, eval_iters=0))) == set()
