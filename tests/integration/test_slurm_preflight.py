"""What preflight.sbatch asks of the nodes, with stand-ins for Slurm, and what it leaves in the log."""

import os
import subprocess
import sys

import pytest

from tests.helpers.entry import ROOT
from tests.helpers.recipes import World, after, build, executable
from tests.helpers.slurm import JOB, preflight, stand_ins


@pytest.fixture
def programs(tmp_path) -> str:
    return stand_ins(tmp_path)


def test_preflight_takes_the_settings_of_a_run(programs):
    data = {"REAL": "0.7 /data/web\n  0.3 /data/code", "SYNTHETIC": "/data/qa"}
    data["MIN_BUS_BANDWIDTH"] = "200"
    result = preflight(programs, "--timeout", "60", OUT="/ckpt", TOKENIZER="/data/tok", **data)
    words = result.stdout.splitlines()
    assert words[:8] == [
        *("srun", "--nodes", "4", "--ntasks", "4", "--ntasks-per-node", "1"),
        "--kill-on-bad-exit=1",
    ]
    assert after(words, "--max-restarts") == ["0"]
    assert after(words, "--nproc-per-node") == ["4"]
    assert after(words, "--rdzv-endpoint") == [f"node7:{20000 + 30123 % 12768}"]
    assert words[words.index("tools/preflight.py") + 1 :] == [
        *(
            "--shared",
            "/ckpt",
            "--table",
            "/ckpt/logs/preflight-30123.0.txt",
            "--tokenizer-type",
            "SentencePieceTokenizer",
        ),
        *("--tokenizer-model", "/data/tok", "--min-bus-bandwidth", "200"),
        *("--data", "/data/web", "/data/code", "/data/qa"),
        *("--timeout", "60"),
    ]


def test_preflight_takes_the_tokenizer_of_an_imported_model(programs, tmp_path):
    lines = ("--num-layers 2", "--tokenizer-type HuggingFaceTokenizer", "--tokenizer-model a/b")
    (tmp_path / "ARGS.txt").write_text("\n".join(lines))
    result = preflight(programs, OUT="/ckpt", MODEL_ARGS=str(tmp_path / "ARGS.txt"))
    words = result.stdout.splitlines()
    assert words[words.index("tools/preflight.py") + 1 :] == [
        *(
            "--shared",
            "/ckpt",
            "--table",
            "/ckpt/logs/preflight-30123.0.txt",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
        ),
        *("--tokenizer-model", "a/b"),
    ]


@pytest.mark.parametrize("code", [0, 1])
def test_preflight_s_table_is_the_end_of_the_log_also_when_a_check_fails(programs, tmp_path, code):
    write = 'while test "$1" != --table; do shift; done; mkdir "$OUT/logs"; echo "1 FAIL" >"$2"'
    executable(tmp_path / "srun", f"{write}; echo 1 FAIL; echo Traceback; exit {code}")
    result = preflight(programs, OUT=str(tmp_path))
    assert (result.returncode, result.stderr) == (code, "")
    assert result.stdout == "1 FAIL\nTraceback\n\n1 FAIL\n"
    [table] = (tmp_path / "logs").iterdir()
    assert table.name == "preflight-30123.0.txt"


def test_preflight_says_that_there_is_no_table(programs, tmp_path):
    executable(tmp_path / "srun", "echo Traceback; exit 3")
    result = preflight(programs, OUT=str(tmp_path))
    assert (result.returncode, result.stdout) == (3, "Traceback\n")
    assert result.stderr.startswith("preflight.sbatch: error: no table; ")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return build(tmp_path_factory.mktemp("world"))


# A checkpoint of the paper's shape with a vocabulary of 300, padded to 384: of each parameter bf16 and fp32
# weights and two moments.
BYTES = 14 * (2 * 384 * 2048 + 32 * (4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048) + 2048)


def test_a_recipe_says_what_a_checkpoint_takes_and_what_it_reads(programs, world):
    settings = world.settings | {"PYTHON": sys.executable, "SLURM_GPUS_ON_NODE": "8"}
    unlearn = "examples/paper/unlearn_lm.sh"
    other = world.directory / "chat.jsonl"
    for recipe, more in ((unlearn, []), (f"{unlearn} --reference-load '{other}'", [str(other)])):
        result = preflight(programs, RECIPE=recipe, **settings)
        assert (result.returncode, result.stderr) == (0, "")
        words = result.stdout.splitlines()
        assert after(words, "--checkpoint-bytes") == [str(BYTES)]
        assert after(words, "--inputs") == [settings["SYNTH_LM"], *more]
    settings |= {"GPUS_PER_NODE": "4", "MICRO_BATCH": "1"}
    chat = preflight(programs, RECIPE="examples/paper/chat.sh", **settings).stdout.splitlines()
    assert after(chat, "--inputs") == [settings["MODEL"], settings["CHAT_DATA"]]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (
            {"RECIPE": "examples/paper/unlearn_lm.sh --fp8-format hybrid"},
            "plan_run.py: error: --fp8-format is not supported by the plan",
        ),
        ({"PYTHON": "python-of-a-container", "CONTAINER_IMAGE": "nvidia/cuda"}, "not found"),
    ],
)
def test_without_a_plan_free_space_is_not_compared_and_it_says_so(programs, world, changes, note):
    settings = world.settings | {"PYTHON": sys.executable, "CONTAINER_MOUNTS": str(world.directory)}
    settings |= {"RECIPE": "examples/paper/unlearn_lm.sh"} | changes
    result = preflight(programs, **settings)
    assert result.returncode == 0, result.stderr
    said, *words = result.stdout.splitlines()
    assert said.startswith(
        "preflight: no plan of examples/paper/unlearn_lm.sh, so free space is not "
    )
    assert note in said
    assert "--checkpoint-bytes" not in words
    assert after(words, "--inputs") == [settings["SYNTH_LM"]]


def test_what_a_recipe_refuses_ends_its_preflight(programs, world, tmp_path):
    settings = world.settings | {"PYTHON": sys.executable, "REAL": "0 /a"}
    result = preflight(programs, RECIPE="examples/paper/base_lm.sh", **settings)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "base_lm.sh: error: REAL: expected a weight above 0, found 0\n"
    # What may not know of dry runs is not started.
    other = executable(tmp_path / "other.sh", f"touch {tmp_path}/started")
    result = preflight(programs, RECIPE=str(other), OUT="/ckpt")
    assert result.stdout.startswith(f"preflight: {other} is no recipe of examples/paper, ")
    assert not (tmp_path / "started").exists()
    result = preflight(programs, RECIPE="none.sh", OUT="/ckpt")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "RECIPE: expected a recipe, found none.sh\n"


def test_without_a_recipe_what_the_settings_name_is_looked_at_if_it_is_there(programs, world):
    chat = world.settings["CHAT_DATA"]
    result = preflight(
        programs, OUT="/ckpt", MODEL="/nowhere", SYNTH_LM=world.settings["SYNTH_LM"], CHAT_DATA=chat
    )
    assert after(result.stdout.splitlines(), "--inputs") == [world.settings["SYNTH_LM"], chat]
    assert result.stderr == "preflight: MODEL: nothing at /nowhere yet, so no node looks for it\n"


def test_a_job_with_a_preflight_gives_it_its_recipe(programs, world, tmp_path):
    settings = world.settings | {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    settings |= {"PATH": programs, "PREFLIGHT": "1", "NODES": "4", "HOME": os.environ["HOME"]}
    result = subprocess.run(
        ["bash", ROOT / "examples" / "slurm" / "unlearn.sbatch", "--save-retain-interval", "2000"],
        **{"cwd": "/", "env": JOB | settings, "text": True, "capture_output": True},
    )
    assert (result.returncode, result.stderr) == (0, "")
    _, first, second = result.stdout.split("srun\n")
    words = first.splitlines()
    assert after(words, "--checkpoint-bytes") == [str(BYTES)]
    assert after(words, "--inputs") == [settings["SYNTH_LM"]]
    assert second.splitlines()[-2:] == ["--save-retain-interval", "2000"]
