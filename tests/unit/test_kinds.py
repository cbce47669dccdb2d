"""A run goes on from a checkpoint of its own kind alone, and says what changed in its objective."""

import re
from argparse import Namespace
from types import SimpleNamespace

import pytest

from megatron_ext.checkpoint.kinds import check_plain, tell_changes
from megatron_ext.checkpoint.source import Start
from megatron_ext.config import UnlearnConfig
from megatron_ext.data import checks
from megatron_ext.exceptions import ConfigError

UNLEARNING = UnlearnConfig(forget_data_path=["qa"])
WITHIN = "dataloader_inter_document_masking"
OBJECTIVE = {
    **{"forget_loss": "bounded", "forget_weight": 0.01, "replay_weight": 1.0},
    **{"mitigation_weight": 1.0, "fp32_logits": False},
}


def start(*, resumed: bool = True, **saved) -> Start:
    checkpoint = SimpleNamespace(directory="ckpt/run", iteration=10, args=Namespace(**saved))
    return Start(checkpoint, "--load", resumed)


def args(**changes) -> Namespace:
    usual = {"skip_train": False, "ckpt_convert_format": None, "rank": 0, "chat_digest": None}
    return Namespace(**usual | {"dataloader_inter_document_masking": False} | changes)


@pytest.mark.parametrize(
    ("saved", "kind"),
    [
        ({"unlearn_composition": {"--global-batch-size": 16}}, "--forget-data-path"),
        ({"unlearn_composition": None, "chat_digest": "a1"}, "--chat-data-path"),
    ],
)
def test_the_rest_of_another_kind_of_run_is_not_trained_on_plainly(saved, kind):
    with pytest.raises(ConfigError, match=rf"^--load ckpt/run: .*{kind}.*--finetune$"):
        check_plain(start(**saved), args())
    check_plain(start(**saved, resumed=False), args())  # from its weights
    check_plain(start(**saved), args(skip_train=True))  # to evaluate it
    check_plain(start(**saved), args(ckpt_convert_format="torch"))


def test_plain_training_goes_on():
    check_plain(start(unlearn_composition=None, chat_digest=None), args())
    check_plain(start(), args())  # stock Megatron's knows neither


def test_what_changed_in_the_objective_is_said_once(caplog):
    resumed = start(**OBJECTIVE)
    tell_changes(resumed, args(**OBJECTIVE), UNLEARNING)
    assert not caplog.records
    changed = OBJECTIVE | {"forget_weight": 5.0, "forget_loss": "gradient-ascent"}
    tell_changes(resumed, args(**changed, rank=1), UNLEARNING)
    tell_changes(start(**OBJECTIVE, resumed=False), args(**changed), UNLEARNING)
    tell_changes(resumed, args(**changed), UnlearnConfig())
    assert not caplog.records
    tell_changes(resumed, args(**changed), UNLEARNING)
    assert caplog.messages == [
        "--forget-loss: bounded until iteration 10, gradient-ascent from here on",
        "--forget-weight: 0.01 until iteration 10, 5.0 from here on",
    ]


@pytest.mark.parametrize(
    ("before", "resumed", "iteration", "chat", "said"),
    [
        (False, True, 10, None, True),
        (False, False, 10, None, True),  # a model that was pre-trained across documents
        (True, True, 10, None, False),
        (None, True, 10, None, False),  # saved by a program that does not know it
        (False, False, 0, None, False),  # imported
        (False, True, 10, "a1", True),
        (False, False, 10, "a1", False),
    ],
)
def test_another_reach_of_attention_is_said(caplog, before, resumed, iteration, chat, said):
    begin = start(**({} if before is None else {WITHIN: before}), resumed=resumed)
    begin.checkpoint.iteration = iteration
    given = args(**{WITHIN: True}, chat_digest=chat)
    tell_changes(Start(None, "", resumed=False), given, UnlearnConfig())
    tell_changes(begin, given, UnlearnConfig())
    told = "--dataloader-inter-document-masking: False until iteration 10, True from here on"
    assert caplog.messages == [told] * said


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"a": True, "b": True, "foreign": None}, None),
        (
            {"a": False, "foreign": None},
            "a: made without --append-eod, so no token ends a document",
        ),
        (
            {"a": True, "b": False, "c": False},
            "b and 1 more: made without --append-eod, .*other data",
        ),
    ],
)
def test_data_without_ends_of_documents_are_told_of(caplog, ends, said):
    manifests = {k: v if v is None else SimpleNamespace(append_eod=v) for k, v in ends.items()}
    checks._tell_of_open_ends(manifests)
    assert len(caplog.messages) == (said is not None)
    if said is not None:
        assert re.match(said, caplog.messages[0])
