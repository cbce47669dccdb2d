"""The lines that say what a run is about to do."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

from megatron_ext.checkpoint.source import ReferenceSource, Start
from megatron_ext.config import UnlearnConfig
from megatron_ext.summary import describe


def args(**changes) -> Namespace:
    usual = {
        **{"skip_train": False, "global_batch_size": 16, "seq_length": 64, "chat_digest": None},
        **{"train_iters": 2000, "train_samples": None, "rampup_batch_size": None},
        **{"step_batch_size_schedule": None, "save": "ckpt/run", "save_interval": 500},
    }
    return Namespace(**usual | changes)


def checkpoint(name: str, iteration: int):
    return SimpleNamespace(directory=Path("ckpt") / name, iteration=iteration)


NOWHERE = Start(None, "--load", resumed=False)
UNLEARNING = UnlearnConfig(forget_data_path=["qa"], forget_batch_size=4)


def lines(*given) -> dict[str, str]:
    found = describe(*given).splitlines()
    return {name: text.strip() for name, text in (line.split(":", 1) for line in found)}


def test_plain_training_from_nothing():
    assert describe(args(), UnlearnConfig(), NOWHERE, None) == (
        "starts:    from random weights\n"
        "objective: cross-entropy\n"
        "steps:     2,000, of 16 samples of 64 tokens: 2,048,000 tokens\n"
        "saves:     every 500 steps and at the end, to ckpt/run"
    )


def test_an_unlearning_run_names_its_terms_and_its_reference():
    start = Start(checkpoint("synth", 9000), "--pretrained-checkpoint", resumed=False)
    found = lines(args(), UNLEARNING, start, ReferenceSource(checkpoint("synth", 9000), None))
    assert found["starts"] == (
        "from the weights of iteration 9,000 of ckpt/synth (--pretrained-checkpoint)"
    )
    assert found["objective"] == (
        "0.01 x bounded forgetting + 1 x cross-entropy + 1 x KL to ckpt/synth, iteration 9,000; "
        "4 of 16 samples a step are forgotten"
    )


def test_a_resumed_run_counts_what_is_left():
    start = Start(checkpoint("run", 500), "--load", resumed=True)
    found = lines(args(), UNLEARNING, start, None)
    assert found["starts"] == "from iteration 500 of ckpt/run (--load)"
    assert found["steps"] == "1,500 of 2,000, of 16 samples of 64 tokens: 1,536,000 tokens"
    assert "KL" not in found["objective"]


def test_what_is_not_known_yet_is_not_counted():
    plain = UnlearnConfig()
    found = lines(args(train_iters=None, train_samples=4096), plain, NOWHERE, None)
    assert found["steps"] == "as many as 4,096 samples of 64 tokens take"
    found = lines(args(rampup_batch_size=["4", "4", "100"]), plain, NOWHERE, None)
    assert found["steps"] == "2,000, of up to 16 samples of 64 tokens"
    assert lines(args(skip_train=True), plain, NOWHERE, None)["saves"] == "nothing"
    found = lines(args(save=None, chat_digest="a1"), plain, NOWHERE, None)
    assert found["saves"] == "nothing, for there is no --save"
    assert found["objective"] == "cross-entropy of the assistant's words"
