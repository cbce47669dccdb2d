"""Settings of the recipes that change what a run reads: its budget is spent all the same."""

import pytest

from tests.helpers.recipes import World, after, build


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return build(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize(
    ("changes", "forget", "step"),
    [
        ({"FORGET_BATCH": "64"}, 64, 64 * 4096),
        ({"GLOBAL_BATCH": "512", "FORGET_BATCH": "64"}, 64, 64 * 4096),
        ({"GLOBAL_BATCH": "512"}, 256, 256 * 4096),
        ({"SEQ_LENGTH": "2048"}, 128, 128 * 2048),
        ({"FORGET_TOKENS": "2000000000"}, 128, 128 * 4096),
    ],
)
def test_replay_share_and_length_leave_the_budget_as_it_is(world, changes, forget, step):
    words = world.command("unlearn_lm", **changes)
    assert after(words, "--forget-batch-size") == [str(forget)]
    assert after(words, "--seq-length") == [changes.get("SEQ_LENGTH", "4096")]
    [iterations] = after(words, "--train-iters")
    tokens = int(changes.get("FORGET_TOKENS", 10**9))
    assert (int(iterations) - 1) * step < tokens <= int(iterations) * step


def test_the_plan_forgets_the_budget_whatever_the_share(world):
    result = world.run("unlearn_lm", "--dry-run", FORGET_BATCH="64")
    assert "3,815 of 1,048,576 tokens" in result.stdout
    assert "3,000,238,080 replayed, 1,000,079,360 forgotten" in result.stdout


@pytest.mark.parametrize(
    ("name", "word", "variable"),
    [
        ("unlearn_lm", "--forget-batch-size", "FORGET_BATCH"),
        ("unlearn_lm_ga", "--seq-length", "SEQ_LENGTH"),
        ("unlearn_lm", "--global-batch-size=64", "GLOBAL_BATCH"),
        ("unlearn_lm_u33b", "--train-iters", "FORGET_TOKENS"),
        ("base_lm", "--train-iters", "BASE_TOKENS"),
        ("synth_lm", "--train-samples=9", "CONTINUE_TOKENS"),
        ("non_synth_lm", "--train-iters", "ABLATION_TOKENS"),
        ("refine_lm", "--global-batch-size", "GLOBAL_BATCH"),
    ],
)
def test_a_flag_that_the_budget_would_not_follow_is_refused(world, name, word, variable):
    line = world.refusal(name, "--dry-run", "--lr", "1", *([word] if "=" in word else [word, "64"]))
    flag = word.partition("=")[0]
    expected = f"{name}.sh: error: {flag}: expected the variable {variable} in its place"
    assert line.startswith(expected), line


def test_chat_tuning_counts_its_own_iterations(world):
    result = world.run("chat", "--dry-run", "--seq-length", "2048", "--chat-epochs", "1")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"FORGET_BATCH": "half"}, "FORGET_BATCH: expected a positive whole number, found half"),
        ({"FORGET_BATCH": "256"}, "FORGET_BATCH: expected fewer than the 256 samples"),
        ({"GLOBAL_BATCH": "1"}, "GLOBAL_BATCH: expected at least 2"),
        ({"FORGET_TOKENS": "1e9"}, "FORGET_TOKENS: expected a positive whole number, found 1e9"),
        ({"SEQ_LENGTH": "4k"}, "SEQ_LENGTH: expected a positive whole number, found 4k"),
    ],
)
def test_wrong_settings_are_refused(world, changes, start):
    line = world.refusal("unlearn_lm", "--dry-run", **changes)
    assert line.startswith(f"unlearn_lm.sh: error: {start}"), line


@pytest.fixture
def model_args(tmp_path):
    """What the import writes of a small model with tied embeddings; its tokenizer is a name."""
    file = tmp_path / "ARGS.txt"
    lines = ("--num-layers 2", "--hidden-size 8", "--seq-length 512", "--bf16")
    tokenizer = ("--tokenizer-type HuggingFaceTokenizer", "--tokenizer-model some/name")
    file.write_text("".join(f"{line}\n" for line in (*lines, *tokenizer)))
    return file


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"--seq-length": "512", "--tokenizer-model": "some/name", "--train-iters": "15259"}),
        ({"SEQ_LENGTH": "256"}, {"--seq-length": "256", "--train-iters": "30518"}),
        ({"TOKENIZER": "other/name"}, {"--tokenizer-model": "other/name"}),
    ],
)
def test_an_imported_model_brings_context_and_tokenizer(world, model_args, changes, expected):
    settings = {"PYTHON": str(world.directory / "echo-words"), "MODEL_ARGS": str(model_args)}
    without = "" if "TOKENIZER" in changes else "TOKENIZER"
    result = world.run("unlearn_lm", **settings, **changes, without=without)
    words = result.stdout.splitlines()
    assert {flag: after(words, flag)[0] for flag in expected} == expected, result.stderr
    assert after(words, "--tokenizer-type") == ["HuggingFaceTokenizer"]
    assert {"--untie-embeddings-and-output-weights", "--ffn-hidden-size"}.isdisjoint(words)


@pytest.mark.parametrize(
    ("line", "start"),
    [
        (None, "MODEL_ARGS: expected the ARGS.txt of an imported model, found no file /"),
        ("--seq-length 512", "MODEL_ARGS: expected flags of a model, with --num-layers"),
        ("--num-layers 2", "MODEL_ARGS: expected flags of a model, with --num-layers"),
        (
            "--num-layers 2 --seq-length 512 --tokenizer-model /moved",
            "TOKENIZER: expected it to be set, for ",
        ),
    ],
)
def test_a_file_of_no_imported_model_is_refused(world, tmp_path, line, start):
    file = tmp_path / "ARGS.txt"
    if line is not None:
        file.write_text(line)
    found = world.refusal("chat", "--dry-run", MODEL_ARGS=str(file), without="TOKENIZER")
    assert found.startswith(f"chat.sh: error: {start}"), found
