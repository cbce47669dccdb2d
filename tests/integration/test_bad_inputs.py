"""What a user can get wrong: one clear line, exit code not 0, no traceback, before anything expensive."""

import json
import shutil

import pytest

from megatron_ext.data.manifest import manifest_path
from tests.helpers import bad_data
from tests.helpers.entry import Launch, run
from tests.helpers.tiny import ITERATIONS, REFERENCE_ITERATION, preprocess, tool, write_tokens
from tests.integration.conftest import TRAIN

# Name: what is added to a good command line (a later flag wins), and what the error must name. The first
# word may choose the command line: plain, resume, nowhere (to start from), unnamed (data); else it starts
# from the base.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "data of another tokenizer": (
        ["--data-path", "{dir}/other_text_document"],
        ["--data-path", "{dir}/other_text_document", "400", "500"],
    ),
    "data of another tokenizer, without manifest": (
        ["--tokenizer-model", "{dir}/other.model", "--data-path", "{dir}/unsigned"],
        ["--data-path", "{dir}/unsigned.bin", "400"],
    ),
    "tokenizer of another vocabulary than the checkpoint": (
        ["--tokenizer-model", "{dir}/other.model"]
        + ["--data-path", "{dir}/other_text_document"]
        + ["--forget-data-path", "{dir}/other_text_document"],
        ["--tokenizer-model", "500", "400"],
    ),
    "tokenizer that is not there": (
        ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "no-such-tokenizer"],
        ["--tokenizer-model: ", "found no folder no-such-tokenizer"],
    ),
    "fewer rows of the embedding than tokens": (
        ["--padded-vocab-size", "384"],
        ["--padded-vocab-size", "500 tokens", "384"],
    ),
    "nowhere to start from": ([], ["--forget-data-path", "--load", "--pretrained-checkpoint"]),
    "all of a starting checkpoint": (["--dist-ckpt-strictness", "raise_all"], ["found raise_all"]),
    "missing starting checkpoint": (["--load", "{dir}/no_such"], ["--load", "{dir}/no_such"]),
    "empty starting checkpoint": (["--load", "{dir}"], ["--load", "latest_checkpointed_iteration"]),
    "missing reference": (
        ["--reference-load", "{dir}/no_such"],
        ["--reference-load", "{dir}/no_such"],
    ),
    "unfinished reference": (
        ["--reference-load", "{dir}"],
        ["--reference-load", "latest_checkpointed_iteration.txt"],
    ),
    "reference without tensors": (
        ["--reference-load", "{dir}/hollow"],
        ["--reference-load", "{dir}/hollow/iter_0000003"],
    ),
    "reference of another architecture": (
        ["--reference-load", "{dir}/narrow"],
        ["--reference-load", "--hidden-size", "32", "16"],
    ),
    "checkpoint of another architecture": (
        ["--num-layers", "2"],
        ["--load", "--num-layers", "2", "4"],
    ),
    "sequence above the checkpoint's": (
        ["--seq-length", "128", "--max-position-embeddings", "128"],
        ["--seq-length", "64", "128"],
    ),
    "plain run with a reference": (
        ["--reference-load", "{base}"],
        ["--reference-load", "--forget-data-path"],
    ),
    "forget batch that does not divide": (
        ["--forget-batch-size", "7"],
        ["--forget-batch-size", "2", "7"],
    ),
    "forget batch at the global batch": (
        ["--forget-batch-size", "16"],
        ["--forget-batch-size", "16"],
    ),
    "forget batch above the global batch": (
        ["--forget-batch-size", "18"],
        ["--forget-batch-size", "18", "16"],
    ),
    "forget batch of nothing": (["--forget-batch-size", "0"], ["--forget-batch-size", "0"]),
    "negative weight": (["--forget-weight", "-0.1"], ["--forget-weight", "-0.1"]),
    "NaN weight": (["--replay-weight", "nan"], ["--replay-weight", "nan"]),
    "infinite weight": (["--mitigation-weight", "inf"], ["--mitigation-weight", "inf"]),
    "no objective": (
        ["--forget-weight", "0", "--replay-weight", "0", "--mitigation-weight", "0"],
        ["--forget-weight", "--replay-weight", "--mitigation-weight", "0"],
    ),
    "batch-size ramp-up": (
        ["--rampup-batch-size", "4", "4", "100"],
        ["--rampup-batch-size", "--step-batch-size-schedule"],
    ),
    "number that is too small": (
        ["--log-interval", "0"],
        ["--log-interval: expected at least 1, found 0"],
    ),
    "heads that do not divide the width": (
        ["--num-attention-heads", "5", "--num-query-groups", "5"],
        ["--hidden-size: ", "--num-attention-heads 5", "found 32"],
    ),
    "groups that do not divide the heads": (
        ["--num-query-groups", "3"],
        ["--num-query-groups: ", "--num-attention-heads 4", "found 3"],
    ),
    "sequence above its positions": (
        ["--seq-length", "128"],
        ["--seq-length: ", "--max-position-embeddings 64", "found 128"],
    ),
    "two precisions": (["--bf16", "--fp16"], ["--bf16, --fp16: ", "found both"]),
    "learning rate of nothing": (["--lr", "0"], ["--lr: ", "above 0, found 0.0"]),
    "learning rate that rises": (["--min-lr", "1"], ["--min-lr: ", "--lr 0.003, found 1.0"]),
    "two lengths": (["--train-samples", "160"], ["--train-samples: ", "--train-iters, found both"]),
    "micro-batch that does not divide": (
        ["--micro-batch-size", "3"],
        ["--global-batch-size: ", "multiple of 3 (--micro-batch-size 3 x ", "found 16"],
    ),
    "fewer ranks than the model needs": (
        ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
        ["ranks (torchrun's --nnodes x --nproc-per-node): ", "--tensor-model-parallel-size 2 x "]
        + ["--pipeline-model-parallel-size 2", "found 1"],
    ),
    "stages with more layers than there are": (
        ["--pipeline-model-parallel-size", "4", "--decoder-first-pipeline-num-layers", "3"]
        + ["--decoder-last-pipeline-num-layers", "3"],
        ["--num-layers: ", "a multiple of 2 more (2 other stages), found 4, -2 more"],
    ),
    "file in the way of the checkpoints": (
        ["--save", "{dir}/list/deep", "--save-interval", "1"],
        ["--save {dir}/list/deep: ", "a file at {dir}/list"],
    ),
    "warm-up as long as the run": (
        ["--lr-warmup-iters", "10"],
        ["--lr-warmup-iters: ", "less than 10", "found 10"],
    ),
    "context parallelism of Transformer Engine": (
        ["--cp-comm-type", "a2a"],
        ["--cp-comm-type: expected all_gather", "found ['a2a']"],
    ),
    "attention within documents in layers of one's own": (
        ["--dataloader-inter-document-masking", "--spec", "module", "name"],
        ["--dataloader-inter-document-masking is not supported", "layers of --spec"],
    ),
    "experts that the checkpoint lacks": (
        ["--num-experts", "4"],
        ["--load: expected --num-experts 4", "found None"],
    ),
    "multi-token prediction": (
        ["--mtp-num-layers", "1"],
        ["--mtp-num-layers", "--forget-data-path"],
    ),
    "a flag at which Megatron leaves": (
        ["--checkpoint-activations"],
        ["refused by Megatron-Core, which says why above"],
    ),
    "plain run whose checkpoint must exist": (
        ["--load", "{dir}/no_such", "--save", "{dir}/no_such", "--save-interval", "1"]
        + ["--exit-on-missing-checkpoint"],
        ["Megatron-Core could not go on, and says why above"],
    ),
    "plain run with a mistyped start": (
        ["--load", "{dir}/no_such", "--save", "{dir}/new", "--save-interval", "1"],
        ["--load: expected a checkpoint directory, found nothing at {dir}/no_such"],
    ),
    "plain fine-tuning with a mistyped start": (
        ["--load", "{dir}/no_such", "--finetune"],
        ["--load: expected a checkpoint directory, found nothing at {dir}/no_such"],
    ),
    "plain run that goes on from an unlearning run": (
        ["--load", "{halfway}"],
        ["--load {halfway}: expected the checkpoint of plain training", "an unlearning run"],
    ),
    "another run's checkpoints to write over": (
        ["--save", "{dir}/hollow", "--save-interval", "1"],
        ["--save {dir}/hollow: expected", "found that of iteration 3", "--overwrite-checkpoints"],
    ),
    "settings in a file": (
        ["--yaml-cfg", "{dir}/no_such.yaml"],
        ["--yaml-cfg is not supported: settings are given as flags only"],
    ),
    "resume against another reference": (
        ["--reference-load", "{dir}/other_weights"],
        ["--reference-load", "digest", "{dir}/other_weights"],
    ),
    "resume with another composition": (
        ["--forget-batch-size", "8"],
        ["--forget-batch-size", "12", "8"],
    ),
} | bad_data.CASES


def kind(name: str) -> str:
    """Which good command line a case starts from."""
    word = name.replace(",", "").split()[0]
    return word if word in ("plain", "resume", "nowhere", "unnamed") else "start"


@pytest.fixture(scope="module")
def places(tiny, server, halfway, runs_directory):
    """Broken data sets and checkpoints."""
    directory = runs_directory / "broken"
    directory.mkdir()
    for name in ("no_idx", "no_bin", "short_bin", "short_idx"):
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{tiny.replay}{suffix}", directory / f"{name}{suffix}")
    (directory / "no_idx.idx").unlink()
    (directory / "no_bin.bin").unlink()
    for name in ("short_bin.bin", "short_idx.idx"):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])
    source = tiny.directory / "replay.jsonl"
    other = directory / "other.model"
    tool("train_tokenizer", "--input", source, "--vocab-size", 400, "--output", other)
    preprocess(source, directory / "other", tokenizer=other)
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{tiny.replay}{suffix}", directory / f"unsigned{suffix}")
    write_tokens(directory / "empty_text_document", documents=0)
    write_tokens(directory / "two", documents=2)
    for suffix in (".bin", ".idx"):
        (directory / f"again{suffix}").symlink_to(f"{tiny.forget}{suffix}")
    (directory / "list").write_text(str(tiny.replay))
    (directory / "bad_list").write_text(f"{tiny.replay} {tiny.replay} 1 {tiny.replay}")
    (directory / "lists.json").write_text(json.dumps({"train": [str(tiny.replay)]}))
    assert manifest_path(directory / "other_text_document").is_file()
    # The iteration that the resumed checkpoint recorded, with the weights of another.
    other_weights = directory / "other_weights"
    other_weights.mkdir()
    recorded = other_weights / f"iter_{REFERENCE_ITERATION:07d}"
    recorded.symlink_to(tiny.base / f"iter_{ITERATIONS:07d}")
    (other_weights / "latest_checkpointed_iteration.txt").write_text(str(REFERENCE_ITERATION))
    hollow = directory / "hollow"
    (hollow / "iter_0000003").mkdir(parents=True)
    (hollow / "latest_checkpointed_iteration.txt").write_text("3")
    narrow = directory / "narrow"
    flags = tiny.plain("--hidden-size", 16, "--train-iters", 1, "--save", narrow)
    server.run_all({"narrow": Launch((*flags, "--save-interval", 1))}, directory / "tensorboard")
    return {
        "dir": directory,
        "replay": tiny.replay,
        "forget": tiny.forget,
        "base": tiny.base,
        "halfway": halfway,
    }


@pytest.fixture(scope="module")
def results(tiny, server, places):
    """Exit code and output of every case."""
    good = {
        "plain": tiny.plain("--train-iters", 10),
        "nowhere": tiny.objective("--train-iters", 10),
        "start": tiny.unlearn("--train-iters", 10),
        "unnamed": tiny.flags("--train-iters", 10, "--load", tiny.base, "--finetune"),
        "resume": tiny.objective(*TRAIN, "--load", places["halfway"]),
    }
    commands = [
        [*map(str, good[kind(name)]), *(text.format(**places) for text in changes)]
        for name, (changes, _) in CASES.items()
    ]
    return dict(zip(CASES, server.results([Launch(c) for c in commands]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_line(results, places, name):
    code, output = results[name]
    assert code != 0
    assert "Traceback" not in output, output[-3000:]
    errors = [
        line for line in output.splitlines() if line.startswith("pretrain_unlearn.py: error:")
    ]
    assert len(errors) == 1, output[-2000:]
    # Argument values are listed above; the error comes last and stands alone.
    assert output.splitlines()[-1] == errors[0]
    for wanted in CASES[name][1]:
        assert wanted.format(**places) in errors[0], errors[0]


def test_no_arguments_at_all_is_an_error_that_says_what_is_missing(runs_directory):
    result = run(Launch(()), runs_directory / "nothing")
    assert result.returncode == 2
    assert "Traceback" not in result.output
    assert (
        "error: --micro-batch-size, --tokenizer-type, --num-layers, --hidden-size" in result.output
    )
    assert "--lr, --train-iters or --train-samples: expected a value, found none" in result.output


def test_help_ends_with_the_flags_of_unlearning(runs_directory):
    result = run(Launch(("--help",)), runs_directory / "help")
    assert result.returncode == 0
    assert "unlearning (arXiv 2406.12397)" in result.output
    own = result.output[result.output.rindex("unlearning (arXiv") :]
    for flag in ("--forget-data-path", "--forget-loss", "--reference-load", "--mitigation-weight"):
        assert flag in own
