"""NaN in a loss or a gradient ends the run at once, says where it came from, and is never saved."""

import re

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ext.finite import MOST_SKIPPED
from tests.helpers.entry import ROOT, Launch
from tests.helpers.poisoned import POISON_STEP
from tests.helpers.tiny import BATCH, FORGET

SCRIPT = ROOT / "tests" / "helpers" / "poisoned.py"
MICRO, BAD, FIRST = 2, 5, 1


@pytest.fixture(scope="module")
def token(tiny):
    """A token of the replayed text alone."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tiny.tokenizer))
    token = tokenizer.piece_to_id("▁the")
    assert token not in np.fromfile(f"{tiny.forget}.bin", np.uint16)
    return token


@pytest.fixture(scope="module")
def runs(tiny, server, token, runs_directory):
    """Runs that save after every step, until the poison works; the first over two pipeline stages."""
    launches = []
    for name, poison, ranks in (("loss", f"token:{token}", 2), ("gradient", f"gradient:{BAD}", 1)):
        save = ("--train-iters", 6, "--save-interval", 1, "--save", runs_directory / f"bad_{name}")
        flags = tiny.unlearn(*save, "--pipeline-model-parallel-size", ranks)
        launches.append(Launch((poison, *flags), ranks=ranks, script=SCRIPT))
    scaled = ("--fp16", "--initial-loss-scale", 4, "--train-iters", 2 * POISON_STEP + MOST_SKIPPED)
    scaled += ("--save-interval", 100, "--save", runs_directory / "bad_fp16")
    launches.append(Launch(("lasting:", *tiny.unlearn(*scaled)), script=SCRIPT))
    alone = ("--train-iters", 6, "--save-interval", 1, "--save", runs_directory / "bad_alone")
    launches.append(Launch((f"gradient:{FIRST}:1", *tiny.unlearn(*alone)), ranks=2, script=SCRIPT))
    names = ("loss", "gradient", "fp16", "alone")
    logs = runs_directory / "tensorboard_finite"
    return {
        name: server.run(launch, logs / name) for name, launch in zip(names, launches, strict=True)
    }


def check_end(result, saved):
    assert result.returncode != 0
    assert f"iteration {POISON_STEP:8d}/" not in result.output
    # The last good checkpoint is the latest one, and the only later folder would be of the bad step.
    tracker = saved / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(POISON_STEP - 1)
    assert not (saved / f"iter_{POISON_STEP:07d}").exists()
    return result.line("pretrain_unlearn.py: error")


def test_a_loss_names_rank_microbatch_and_samples(tiny, runs, token, runs_directory):
    """The first replay microbatch is the first that meets the token."""
    error = check_end(runs["loss"], runs_directory / "bad_loss")
    first = (POISON_STEP - 1) * (BATCH - FORGET)
    assert f"step {POISON_STEP}, rank 1: the loss of microbatch {FORGET // MICRO} is nan" in error
    samples = re.findall(rf"sample (\d+) of {tiny.replay} \(documents ([\d, ]+)", error)
    assert [int(sample) for sample, _ in samples] == [first, first + 1]
    data = IndexedDataset(str(tiny.replay))
    named = [int(number) for _, numbers in samples for number in re.findall(r"\d+", numbers)]
    assert any(token in data[number] for number in named)


def test_a_gradient_names_microbatch_and_samples(tiny, runs, runs_directory):
    error = check_end(runs["gradient"], runs_directory / "bad_gradient")
    assert f"step {POISON_STEP}, rank 0: found NaN in local grad norm for bucket" in error
    assert f"it comes from microbatch {BAD}, its samples: " in error
    first = (POISON_STEP - 1) * FORGET + BAD * MICRO
    named = re.findall(rf"sample (\d+) of {tiny.forget} ", error)
    assert [int(sample) for sample in named] == [first, first + 1]


def test_of_data_parallel_ranks_the_bad_one_speaks(tiny, runs, runs_directory):
    """The others have its gradient in their sums, and end without a step."""
    error = check_end(runs["alone"], runs_directory / "bad_alone")
    assert f"step {POISON_STEP}, rank 1: found NaN in local grad norm for bucket" in error
    assert f"it comes from microbatch {FIRST}, its samples: " in error
    first = (POISON_STEP - 1) * FORGET + FIRST * 2 * MICRO + MICRO
    named = re.findall(rf"sample (\d+) of {tiny.forget} ", error)
    assert [int(sample) for sample in named] == [first, first + 1]
    assert "over all ranks" not in runs["alone"].output


def test_a_loss_scale_that_cannot_fall_ends_the_run(runs, runs_directory):
    """From 4 it falls behind the second step that is skipped, and then behind each."""
    result = runs["fp16"]
    assert result.returncode != 0
    error = result.line("pretrain_unlearn.py: error")
    at_least = POISON_STEP + 2
    assert (
        f"step {at_least + MOST_SKIPPED - 1}, rank 0: the gradients of {MOST_SKIPPED} steps"
        in error
    )
    assert "its samples: sample " in error
    # All steps before are logged, though no save had them written.
    assert max(result.scalars["unlearn loss"]) == at_least + MOST_SKIPPED - 2
    assert not (runs_directory / "bad_fp16").exists()
