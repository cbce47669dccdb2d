"""The lines that say what a run is about to do."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ext.checkpoint.source import ReferenceSource, Start
from megatron_ext.config import UnlearnConfig
from megatron_ext.rates import describe_rate, find_rates, warn_of_end
from megatron_ext.summary import describe


def args(**changes) -> Namespace:
    usual = {
        **{"skip_train": False, "global_batch_size": 16, "seq_length": 64, "chat_digest": None},
        **{"train_iters": 2000, "train_samples": None},
        **{"step_batch_size_schedule": None, "save": "ckpt/run", "save_interval": 500},
        **{"lr": 1e-3, "min_lr": 0.0, "lr_decay_style": "linear", "lr_warmup_init": 0.0},
        **{"lr_warmup_fraction": None, "lr_warmup_iters": 0, "lr_warmup_samples": 0},
        **{"lr_decay_iters": None, "lr_decay_samples": None, "lr_wsd_decay_style": None},
        **{"lr_wsd_decay_iters": None, "lr_wsd_decay_samples": None, "no_load_optim": False},
        **{"start_weight_decay": 0.1, "end_weight_decay": 0.1, "rank": 0},
        **{"weight_decay_incr_style": "constant"},
        "dataloader_inter_document_masking": False,
        **{"override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False},
    }
    return Namespace(**usual | changes)


def checkpoint(name: str, iteration: int):
    saved = {**SCHEDULE, "max_lr": 1e-3, "num_steps": 16 * iteration, "lr_decay_steps": 32_000}
    return SimpleNamespace(
        directory=Path("ckpt") / name, iteration=iteration, schedule=saved, args=args()
    )


SCHEDULE = {"min_lr": 0.0, "lr_warmup_steps": 0, "lr_decay_style": "linear"}
NOWHERE = Start(None, "--load", resumed=False)
UNLEARNING = UnlearnConfig(forget_data_path=["qa"], forget_batch_size=4)


def lines(*given) -> dict[str, str]:
    found = describe(*given).splitlines()
    return {name: text.strip() for name, text in (line.split(":", 1) for line in found)}


def test_plain_training_from_nothing():
    assert describe(args(), UnlearnConfig(), NOWHERE, None) == (
        "starts:    from random weights\n"
        "objective: cross-entropy\n"
        "steps:     2,000, each of 16 samples of 64 tokens: 2,048,000 tokens\n"
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


@pytest.mark.parametrize(
    ("config", "chat", "ends"),
    [
        (UnlearnConfig(), None, "cross-entropy; attention within documents"),
        (UnlearnConfig(), "a1", "on the assistant's tokens; attention within conversations"),
        (UNLEARNING, None, "a step are forgotten; attention within documents"),
    ],
)
def test_attention_within_documents_is_part_of_the_objective(config, chat, ends):
    given = args(dataloader_inter_document_masking=True, chat_digest=chat)
    found = lines(given, config, Start(checkpoint("synth", 1), "--load", resumed=False), None)
    assert found["objective"].endswith(ends)


def test_a_resumed_run_counts_what_is_left():
    start = Start(checkpoint("run", 500), "--load", resumed=True)
    found = lines(args(), UNLEARNING, start, None)
    assert found["starts"] == "from iteration 500 of ckpt/run (--load)"
    assert (
        found["steps"] == "1,500 left of 2,000, each of 16 samples of 64 tokens: 1,536,000 tokens"
    )
    assert found["lr"] == "7.5e-04 at iteration 500, 7.5e-04 from here, 0.0e+00 at the end"
    assert "KL" not in found["objective"]


def test_what_is_not_known_yet_is_not_counted():
    plain = UnlearnConfig()
    found = lines(args(train_iters=None, train_samples=4096), plain, NOWHERE, None)
    assert found["steps"] == "as many as 4,096 samples of 64 tokens need"
    found = lines(args(step_batch_size_schedule="0:4 9:16"), plain, NOWHERE, None)
    assert found["steps"] == "2,000, each of up to 16 samples of 64 tokens"
    assert lines(args(skip_train=True), plain, NOWHERE, None)["saves"] == "nothing"
    found = lines(args(save=None, chat_digest="a1"), plain, NOWHERE, None)
    assert found["saves"] == "nothing (no --save)"
    assert found["objective"] == "cross-entropy on the assistant's tokens"


OVERRIDE, KEPT = (
    {"override_opt_param_scheduler": True},
    {"use_checkpoint_opt_param_scheduler": True},
)
LARGER = {"global_batch_size": 64}
WSD = {**OVERRIDE, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 400}
WSD |= {"lr_wsd_decay_style": "linear"}


@pytest.mark.parametrize(
    ("changes", "rates", "remedy"),
    [
        ({"lr": 2e-3, **OVERRIDE}, "1.5e-03 from here, 0.0e+00 at the end", None),
        ({"lr": 2e-3, **KEPT}, "7.5e-04 from here, 0.0e+00 at the end", None),
        (
            {"lr": 2e-3, **KEPT, "no_load_optim": True},
            "2.0e-03 from here, 5.0e-04 at the end",
            "--lr-decay-iters 1500",
        ),
        ({"no_load_optim": True}, "1.0e-03 from here, 2.5e-04 at the end", "--lr-decay-iters 1500"),
        # 128,000 samples of the schedule, of which 8,000 + 1,500 x 64 are trained on.
        ({**LARGER, **OVERRIDE}, "9.4e-04 from here, 1.9e-04 at the end", "--lr-decay-iters 1625"),
        # 24,000 samples are left of its 32,000, which are 375 steps; rates stay at the least from there.
        ({**LARGER, **KEPT}, "7.5e-04 from here, 0.0e+00 at the end", "--train-iters 875"),
        (
            {**LARGER, **OVERRIDE, "train_iters": None, "train_samples": 128_000},
            "9.4e-04 from here, 1.9e-04 at the end",
            "--lr-decay-samples 104000",
        ),
        # What was asked for.
        (
            {**LARGER, **OVERRIDE, "lr_decay_iters": 3000},
            "9.6e-04 from here, 4.6e-04 at the end",
            None,
        ),
        (
            {**LARGER, **OVERRIDE, "lr_decay_style": "constant"},
            "1.0e-03 from here, 1.0e-03 at",
            None,
        ),
        ({**LARGER, **OVERRIDE, "min_lr": 1e-3}, "1.0e-03 from here, 1.0e-03 at the end", None),
        ({**WSD, "train_iters": 1000}, "1.0e-03 from here, 0.0e+00 at the end", None),
        ({**WSD, "train_iters": 800}, "7.5e-04 from here, 0.0e+00 at the end", None),
        ({**LARGER, **OVERRIDE, "train_iters": 500}, "7.5e-04 from here, 7.5e-04 at the end", None),
        ({**OVERRIDE, "step_batch_size_schedule": "0:16 9:32"}, "7.5e-04 from here", None),
    ],
)
def test_a_resumed_run_tells_its_rates_and_where_it_misses_the_end(changes, rates, remedy, caplog):
    start = Start(checkpoint("run", 500), "--load", resumed=True)
    found = describe_rate(args(**changes), start)
    assert found.startswith(f"7.5e-04 at iteration 500, {rates}")
    warn_of_end(args(**changes), start)
    assert len(caplog.messages) == (remedy is not None)
    if remedy is not None:
        assert f"; {remedy} would let both end together" in caplog.messages[0]
        # It does.
        flag, value = remedy.split()
        caplog.clear()
        name = flag.removeprefix("--").replace("-", "_")
        assert find_rates(args(**changes | {name: int(value)}), start.checkpoint).last < 1e-5
        warn_of_end(args(**changes | {name: int(value)}), start)
        assert not caplog.messages
