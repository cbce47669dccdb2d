"""The paper's recipes: what each would start, what each refuses, and how Slurm would see it."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.entry import ROOT
from tests.helpers.recipes import MINI, RECIPES, TABLE, World, after, build, executable
from tests.unit.test_plan import write_index


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return build(tmp_path_factory.mktemp("recipes"))


# One node for chat's batch of 64, and two for the others.
CLUSTER = {"NODES": "2", "GPUS_PER_NODE": "8"}


@pytest.fixture(scope="module")
def commands(world) -> dict[str, list[str]]:
    return {name: world.command(name, **CLUSTER) for name in TABLE}


def test_every_recipe_is_in_the_table():
    others = {"common", "study_mini"}
    assert {path.stem for path in RECIPES.glob("*.sh")} - others == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_each_recipe_has_the_paper_s_architecture_and_rates(name, world, commands):
    words, recipe = commands[name], TABLE[name]
    expected = {
        **{"--num-layers": "32", "--hidden-size": "2048", "--ffn-hidden-size": "5504"},
        **{"--num-attention-heads": "32", "--seq-length": "4096", "--lr": recipe.lr},
        "--global-batch-size": str(recipe.batch),
        "--lr-decay-style": "cosine" if name == "base_lm" else "constant",
        **dict.fromkeys(("--load", "--save"), world.settings["OUT"]),
    }
    assert {flag: after(words, flag) for flag in expected} == {k: [v] for k, v in expected.items()}
    if recipe.start is None:
        assert "--pretrained-checkpoint" not in words
    else:
        assert after(words, "--pretrained-checkpoint") == [world.settings[recipe.start]]
    if recipe.flags:
        assert after(words, recipe.flags[0]) == [recipe.flags[1]]
    assert ("--forget-loss" in words) == (name == "unlearn_lm_ga")


@pytest.mark.parametrize("name", [name for name in TABLE if name != "chat"])
def test_the_budget_is_spent_in_the_fewest_iterations(name, commands):
    words, recipe = commands[name], TABLE[name]
    [iterations], [batch] = after(words, "--train-iters"), after(words, "--global-batch-size")
    samples = int(after(words, "--forget-batch-size")[0]) if recipe.forget else int(batch)
    step = samples * 4096
    assert (int(iterations) - 1) * step < recipe.tokens <= int(iterations) * step


def test_blends_and_what_is_forgotten(world, commands):
    web, code = world.settings["REAL"].split()[1::2]
    for name, recipe in TABLE.items():
        if name == "chat":
            assert after(commands[name], "--chat-data-path") == [world.settings["CHAT_DATA"]]
            assert after(commands[name], "--chat-epochs") == ["2"]
            assert "--dataset-log-interval" not in commands[name]
            continue
        blend = ["0.75", web, "0.25", code]
        if len(recipe.data) == 2:
            blend = ["0.735", web, "0.245", code, "0.02", world.settings[recipe.data[1]]]
        assert after(commands[name], "--data-path") == blend
        if recipe.forget:
            forgotten = after(commands[name], "--forget-data-path")
            assert forgotten == ["1", world.settings[recipe.forget]]
            weights = [f"--{term}-weight" for term in ("forget", "replay", "mitigation")]
            assert [after(commands[name], w)[0] for w in weights] == ["0.01", "1", "1"]
        else:
            assert "--forget-data-path" not in commands[name]


def test_settings_may_stand_on_several_lines(world, commands):
    """A second line was left out, and with it the data sets that it names."""
    lines = {
        key: value.replace(" ", "\n  ") for key, value in world.settings.items() if key == "REAL"
    }
    assert world.command("synth_lm", **CLUSTER, **lines) == commands["synth_lm"]
    chat = {"CHAT_DATA": "\n{0}\n{0}\n".format(world.settings["CHAT_DATA"])}
    files = after(world.command("chat", **CLUSTER, **chat), "--chat-data-path")
    assert files == [world.settings["CHAT_DATA"]] * 2


def test_megatron_knows_every_flag(commands, monkeypatch):
    from megatron.training.arguments import parse_args

    from megatron_ext.arguments import add_arguments

    for name, words in commands.items():
        start = words.index(str(ROOT / "pretrain_unlearn.py"))
        monkeypatch.setattr(sys, "argv", words[start:])
        args = parse_args(add_arguments)
        assert (args.num_layers, args.lr) == (32, float(TABLE[name].lr))


def test_the_plan_follows_the_command(world):
    result = world.run("unlearn_lm", "--dry-run", **CLUSTER, TP="2", PLAN="--rank-layouts 2")
    assert "1,908 of 1,048,576 tokens" in result.stdout
    # 300 pieces are padded to a multiple of 128 x TP 2.
    assert "vocabulary 300, padded to 512" in result.stdout
    # 1,908 iterations of 128 samples x 4096 tokens from 99.9% of 1e7 tokens.
    assert "1,000,341,504 of 9,990,000 tokens, 100.134 epochs" in result.stdout
    assert "reference hidden states" in result.stdout
    assert "% of H100's 80 GB" in result.stdout
    assert "layouts       " in result.stdout
    command = shlex.split(result.stdout.splitlines()[0])
    assert "--sequence-parallel" in command
    assert after(command, "--nnodes") == [CLUSTER["NODES"]]  # as Slurm would start it
    assert not Path(world.settings["OUT"]).exists()


def test_a_dry_run_refuses_data_that_the_job_would_not_split(world):
    few = write_index(world.directory / "few", 402 * 10**4, 402)
    for plan in ("", "--check"):
        result = world.run("unlearn_lm", "--dry-run", **CLUSTER, SYNTHETIC=few, PLAN=plan)
        assert result.returncode == 2
        assert result.stderr == (
            f"plan_run.py: error: --split: expected at least one document of --forget-data-path {few} for "
            "the valid split, found none of its 402 with shares 999,1,0\n"
        )
    other = world.run("unlearn_lm", "--dry-run", "--split", "9,1,0", **CLUSTER, SYNTHETIC=few)
    assert (other.returncode, other.stderr) == (0, "")


def test_sizes_and_environment_change_numbers_and_no_flag(world, commands):
    paper = commands["synth_lm"]
    mini = world.command("synth_lm", SIZE=str(MINI), MICRO_BATCH="2", GLOBAL_BATCH="32")
    dropped = {"--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce"}
    dropped |= {"--overlap-param-gather", "--eval-interval"}
    start = len(paper) - paper[::-1].index(str(ROOT / "pretrain_unlearn.py"))
    flags = [word for word in paper[start:] if word.startswith("--") and word not in dropped]
    start = mini.index(str(ROOT / "pretrain_unlearn.py"))
    assert [word for word in mini[start:] if word.startswith("--")] == flags
    assert after(mini, "--hidden-size") == ["192"]
    assert after(mini, "--micro-batch-size") == ["2"]
    # 819,200 tokens in steps of 32 x 256.
    assert after(mini, "--train-iters") == ["100"]
    assert after(mini, "--nproc-per-node") == ["2"]


@pytest.mark.parametrize("name", TABLE)
def test_each_missing_setting_and_path_is_named(name, world):
    for variable in world.variables(name):
        line = world.refusal(name, "--dry-run", without=variable)
        assert line.startswith(f"{name}.sh: error: {variable} is not set: ")
        if variable != "OUT":
            line = world.refusal(name, **{variable: str(world.directory / "nowhere")})
            assert line.startswith(f"{name}.sh: error: {variable}: no"), line


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"REAL": "1 /a 2"}, "REAL: expected one prefix, or weights and prefixes"),
        ({"REAL": " \n"}, "REAL: expected one prefix, or weights and prefixes"),
        ({"REAL": "0 /a"}, "REAL: expected a weight above 0, found 0"),
        ({"TP": "two"}, "TP: expected a positive whole number, found two"),
        ({"GLOBAL_BATCH": "0"}, "GLOBAL_BATCH: expected a positive whole number, found 0"),
        ({"SIZE": "/nowhere"}, "SIZE: expected a file of sizes, found nothing at /nowhere"),
        ({"NODES": "2"}, "NODES: more than one node is started by Slurm, found 2"),
        ({"PYTHON": "/nowhere"}, "PYTHON: /nowhere cannot be run"),
    ],
)
def test_wrong_settings_are_refused(world, changes, start):
    assert world.refusal("base_lm", **changes).startswith(f"base_lm.sh: error: {start}")


@pytest.mark.parametrize(
    "word", ["--dryrun", "--dry_run", "--dry", "--dry-run=1", "-dry-run", "--dry-rum", "--Dry-Run"]
)
def test_a_mistyped_dry_run_starts_nothing(world, word):
    started = {"PYTHON": str(world.directory / "echo-words")}
    line = world.refusal("base_lm", "--exit-interval", "5", word, **started)
    assert line == f"base_lm.sh: error: {word}: expected --dry-run, found an unknown flag"
    line = world.refusal("base_lm", DRY_RUN="yes", **started)
    assert line == "base_lm.sh: error: DRY_RUN: expected 0 or 1, found yes"


def test_a_model_is_not_written_over_the_one_that_it_starts_from(world):
    trained = world.settings["BASE_LM"]
    line = world.refusal("synth_lm", OUT=f"{trained}/../trained")
    assert line.startswith("synth_lm.sh: error: OUT: expected another folder than BASE_LM")


def test_a_dry_run_may_come_before_its_checkpoint(world):
    result = world.run("synth_lm", "--dry-run", BASE_LM="/nowhere", **CLUSTER)
    assert result.returncode == 0
    assert result.stdout.startswith("note: BASE_LM: no checkpoint in /nowhere yet")


def test_one_node_is_started_by_torchrun_with_the_words_of_the_user_last(world, tmp_path):
    out = tmp_path / "out"
    result = world.run(
        "synth_lm",
        *("--exit-interval", "5"),
        **{"PYTHON": str(world.directory / "echo-words"), "OUT": str(out), "SIZE": str(MINI)},
    )
    words = result.stdout.splitlines()
    expected = ["OMP=1", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    assert words[:7] == [*expected, str(ROOT / "pretrain_unlearn.py")]
    assert words[-2:] == ["--exit-interval", "5"]
    assert (out / "logs").is_dir()


def test_a_slurm_job_starts_one_torchrun_a_node(world, tmp_path):
    executable(tmp_path / "srun", 'printf "%s\\n" srun "$@"')
    executable(tmp_path / "scontrol", 'test "$3" = "node[7-10]" && printf "node7\\nnode8\\n"')
    job = {
        **{"SLURM_JOB_ID": "30123", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[7-10]"},
        **{"SLURM_GPUS_ON_NODE": "4", "OUT": str(tmp_path / "out")},
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    # As submitted: Slurm starts a copy of the job script somewhere else.
    copy = shutil.copy(RECIPES / "job.sbatch", tmp_path / "slurm_script")
    environment = {"PYTHON": sys.executable} | world.variables("synth_lm") | job
    result = subprocess.run(
        ["bash", copy, "examples/paper/synth_lm.sh"],
        **{"cwd": ROOT, "env": environment, "text": True, "capture_output": True},
    )
    container = {"CONTAINER_IMAGE": "nvidia/cuda", "CONTAINER_MOUNTS": str(tmp_path)}
    refused = subprocess.run(
        ["bash", copy, "examples/paper/synth_lm.sh"],
        **{"cwd": ROOT, "env": environment | container, "text": True, "capture_output": True},
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("TOKENIZER: expected a path that the container sees, below ")
    words = result.stdout.splitlines()
    assert words[:8] == [
        *("srun", "--nodes", "4", "--ntasks", "4", "--ntasks-per-node", "1"),
        "--kill-on-bad-exit=1",
    ]
    assert after(words, "--nproc-per-node") == ["4"]
    assert after(words, "--nnodes") == ["4"]
    assert after(words, "--rdzv-endpoint") == [f"node7:{20000 + 30123 % 12768}"]
    assert words.index("--tee") < words.index(str(ROOT / "pretrain_unlearn.py"))


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*RECIPES.glob("*.sh"), *RECIPES.glob("sizes/*.sh"), *RECIPES.glob("*.sbatch")]
    result = subprocess.run(
        ["shellcheck", *map(str, scripts)], cwd=RECIPES, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
