"""Chat tuning by the real entry point: normalisation, epochs, resume, what is refused."""

import pytest

from megatron_ext.analysis.scalars import compare
from megatron_ext.checkpoint.inspect import open_checkpoint
from megatron_ext.data.chat_template import BUILT_IN, TEMPLATE_FILE, load_template
from megatron_ext.data.tokenizers import TokenizerSpec
from tests.helpers.conversations import chat_flags, conversations, write_jsonl
from tests.helpers.entry import ROOT, Launch
from tests.helpers.tiny import BATCH, at_iteration

# The same sums in another order, in fp32 (6e-8), and each step starts from the weights of the one before.
# 3e-7 was seen after 4 steps; the mean of means differs by 8e-2 and more in the first gradient already.
TOLERANCE = 3e-6
LAYOUTS = {
    "micro-batch 1": (1, ("--micro-batch-size", 1)),
    "micro-batch 2": (1, ("--micro-batch-size", 2)),
    "micro-batch 4": (1, ("--micro-batch-size", 4)),
    "DP 2": (2, ("--micro-batch-size", 2)),
    "CP 2": (2, ("--micro-batch-size", 2, "--context-parallel-size", 2)),
}
TAGS = ("lm loss", "grad-norm")
HALF = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations to tune on and to validate on."""
    directory = tmp_path_factory.mktemp("chat")
    write_jsonl(directory / "valid.jsonl", conversations(60, seed=2))
    return write_jsonl(directory / "train.jsonl", conversations(300, seed=1))


@pytest.fixture(scope="module")
def runs(tiny, server, data, runs_directory):
    """Four steps at each layout, right and wrong; a whole tuning, in one piece and in two."""
    start = ("--load", tiny.base, "--finetune")
    launches = {}
    for name, (ranks, layout) in LAYOUTS.items():
        flags = chat_flags(tiny, data, *start, "--train-iters", 4, *layout)
        launches[name] = Launch(flags, ranks=ranks)
        apart = (*flags, "--dataloader-inter-document-masking")
        launches[f"apart, {name}"] = Launch(apart, ranks=ranks)
    wrong = ROOT / "tests" / "helpers" / "mean_of_means.py"
    for name in ("micro-batch 1", "micro-batch 4"):
        right = launches[name]
        launches[f"wrong, {name}"] = Launch(right.arguments, ranks=right.ranks, script=wrong)
    valid = ("--chat-valid-data-path", data.with_name("valid.jsonl"), "--eval-iters", 2)
    whole = (*valid, "--eval-interval", HALF, "--save-interval", HALF)
    save = runs_directory / "chat"
    launches["whole"] = Launch(chat_flags(tiny, data, *start, *whole, "--save", save))
    found = server.run_all(launches, runs_directory / "chat_tensorboard")
    halfway = at_iteration(save, HALF, runs_directory / "chat_halfway")
    tuned = ("--pretrained-checkpoint", save, "--train-iters", 1, "--save-interval", 1)
    tuned = (*tuned, "--save", runs_directory / "chat_unlearned")
    later = {
        "rest": Launch(chat_flags(tiny, data, *whole, "--load", halfway)),
        "unlearned": Launch(tiny.objective(*tuned)),
    }
    return found | server.run_all(later, runs_directory / "chat_later")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_do_not_depend_on_the_layout(runs, layout):
    expected = runs["micro-batch 1"].scalars
    assert len(expected["lm loss"]) == 4
    for tag, difference in compare(expected, runs[layout].scalars, tags=TAGS).items():
        assert difference <= TOLERANCE, tag


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversations_apart_are_another_loss_in_every_layout_the_same(runs, layout):
    expected = runs["apart, micro-batch 1"].scalars
    for tag, difference in compare(expected, runs[f"apart, {layout}"].scalars, tags=TAGS).items():
        assert difference <= TOLERANCE, tag
    together = runs["micro-batch 1"].scalars
    assert compare(expected, together, tags=TAGS)["lm loss"] > 100 * TOLERANCE


def test_a_mean_of_means_depends_on_the_layout(runs):
    """The test above would find it: these masks are uneven enough."""
    right = runs["micro-batch 1"].scalars
    for layout in ("micro-batch 1", "micro-batch 4"):
        wrong = runs[f"wrong, {layout}"].scalars
        # The loss that is reported is right before the first step: it alone would not tell.
        assert wrong["lm loss"][1] == pytest.approx(right["lm loss"][1], rel=TOLERANCE)
        assert abs(wrong["grad-norm"][1] / right["grad-norm"][1] - 1) > 1e-2
        assert compare(right, wrong, tags=TAGS)["lm loss"] > 1e3 * TOLERANCE


def test_two_epochs_make_as_many_iterations_as_are_needed(runs):
    line = runs["whole"].line("chat: ")
    sequences = int(line.partition(" sequences an epoch")[0].split()[-1])
    steps = len(runs["whole"].scalars["lm loss"])
    assert f"2 epochs in {steps} iterations" in line
    assert 2 * sequences / BATCH == pytest.approx(steps, abs=1)
    assert runs["whole"].line("chat validation: 60 conversations")


def test_the_loss_falls_in_training_and_validation(runs):
    train, valid = (runs["whole"].series(tag) for tag in ("lm loss", "lm loss validation"))
    assert train[-1] < 0.6 * train[0]
    assert valid[-1] < valid[0] < train[0]


def test_a_resumed_run_goes_on_bit_for_bit(runs):
    whole, rest = runs["whole"].scalars, runs["rest"].scalars
    assert sorted(rest["lm loss"]) == [s for s in sorted(whole["lm loss"]) if s > HALF]
    for tag in ("lm loss", "grad-norm", "lm loss validation"):
        later = {step: value for step, value in whole[tag].items() if step in rest[tag]}
        assert later
        assert rest[tag] == later, tag


def test_the_template_lies_beside_the_checkpoints_and_in_them(runs, tiny, runs_directory):
    save = runs_directory / "chat"
    spec = TokenizerSpec(
        tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tiny.tokenizer)
    )
    assert load_template(spec, path=save).source == BUILT_IN
    assert (save / TEMPLATE_FILE).read_text() == BUILT_IN
    saved = open_checkpoint(str(save), flag="--load").args
    assert saved.tuned_chat_template == BUILT_IN
    assert len(saved.chat_digest) == 64


def test_a_tuned_model_that_is_unlearned_keeps_its_template(runs, runs_directory):
    save = runs_directory / "chat_unlearned"
    assert (save / TEMPLATE_FILE).read_text() == BUILT_IN
    saved = open_checkpoint(str(save), flag="--load").args
    assert saved.tuned_chat_template == BUILT_IN
    assert saved.chat_digest is None


# What is added to a good command line, and what the error must name. The first word chooses the start.
BAD = {
    "base: with unlearning": (["--forget-data-path", "{forget}"], ["unlearn", "--chat-data-path"]),
    "base: with text": (["--data-path", "{replay}"], ["--data-path", "--chat-data-path"]),
    "nowhere: ": ([], ["--chat-data-path", "--load", "--pretrained-checkpoint"]),
    "base: no such file": (
        ["--chat-data-path", "{dir}/none"],
        ["--chat-data-path", "{dir}/none"],
    ),
    "base: bad record": (["--chat-data-path", "{dir}/bad.jsonl"], ["{dir}/bad.jsonl:2:", "found"]),
    "base: no epochs": (["--chat-epochs", "0"], ["--chat-epochs", "at least 1", "0"]),
    "base: no template": (["--chat-template", "{dir}/no.jinja"], ["--chat-template", "no.jinja"]),
    "base: bad template": (["--chat-template", "{dir}/bad.jinja"], ["--chat-template", "as it is"]),
    "base: nothing to validate on": (["--eval-iters", "3"], ["--eval-iters", "--chat-valid"]),
    "base: cyclic": (["--dataloader-type", "cyclic"], ["--dataloader-type", "single", "cyclic"]),
    "base: end of text": (["--eod-mask-loss"], ["--eod-mask-loss", "--chat-data-path"]),
    "continued: ": ([], ["--load", "--finetune"]),
    "resumed: other seed": (["--seed", "7"], ["--chat-data-path", "--seed", "digest"]),
    "resumed: other batch": (["--global-batch-size", "32"], ["--global-batch-size", "32"]),
    "resumed: other data": (["--chat-data-path", "{dir}/other.jsonl"], ["--chat-data-path"]),
}


@pytest.fixture(scope="module")
def refusals(tiny, server, data, runs, runs_directory):
    """Exit code and output of every case, from one process."""
    places = {"dir": data.parent, "replay": tiny.replay, "forget": tiny.forget}
    write_jsonl(data.with_name("bad.jsonl"), [*conversations(1, seed=1), {"text": "a"}])
    write_jsonl(data.with_name("other.jsonl"), conversations(9, seed=9))
    data.with_name("bad.jinja").write_text("{{ messages[0]['content'] }}")
    starts = {
        "base": ("--load", tiny.base, "--finetune"),
        "nowhere": (),
        "continued": ("--load", tiny.base),
        "resumed": ("--load", runs_directory / "chat_halfway"),
    }
    commands = [
        [str(flag) for flag in chat_flags(tiny, data, *starts[name.partition(":")[0]])]
        + [change.format(**places) for change in changes]
        for name, (changes, _) in BAD.items()
    ]
    results = server.results([Launch(command) for command in commands])
    return dict(zip(BAD, results, strict=True)), places


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(refusals, name):
    results, places = refusals
    code, output = results[name]
    assert code == 2, output[-3000:]
    assert "Traceback" not in output
    error = output.splitlines()[-1]
    assert error.startswith("pretrain_unlearn.py: error: ")
    for wanted in BAD[name][1]:
        assert wanted.format(**places) in error, error
