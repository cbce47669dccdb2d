"""What the job scripts of examples/slurm would start, with stand-ins for Slurm; see `make slurm-test`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.entry import ROOT
from tests.helpers.recipes import after, build, executable

SLURM = ROOT / "examples" / "slurm"
JOB = {
    **{"SLURM_JOB_ID": "30123", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[7-10]"},
    **{"SLURM_GPUS_ON_NODE": "4", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": "python"},
}


@pytest.fixture
def programs(tmp_path) -> str:
    """PATH with programs that print what they are asked to do."""
    executable(tmp_path / "srun", 'printf "%s\\n" srun "$@"')
    executable(tmp_path / "scontrol", 'test "$3" = "node[7-10]" && printf "node7\\nnode8\\n"')
    return f"{tmp_path}:{os.environ['PATH']}"


def preflight(programs: str, *words: str, **variables: str) -> subprocess.CompletedProcess:
    # Started from a copy and from elsewhere, as Slurm does.
    return subprocess.run(
        ["bash", str(SLURM / "preflight.sbatch"), *words],
        **{
            "cwd": "/",
            "env": {"PATH": programs} | JOB | variables,
            "text": True,
            "capture_output": True,
        },
    )


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
        *("--shared", "/ckpt", "--tokenizer-type", "SentencePieceTokenizer"),
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
        *("--shared", "/ckpt", "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", "a/b"),
    ]


def test_the_names_of_many_nodes_are_read_to_their_end(programs, tmp_path):
    """Slurm's program was ended by SIGPIPE, and the job with it."""
    executable(tmp_path / "scontrol", "seq -f node%06g 7 20000")
    result = preflight(programs, OUT="/ckpt")
    assert result.returncode == 0, result.stderr
    [endpoint] = after(result.stdout.splitlines(), "--rdzv-endpoint")
    assert endpoint.startswith("node000007:")


@pytest.mark.parametrize(("job", "port"), [(12767, 32767), (12768, 20000), (38303, 32767)])
def test_the_rendezvous_is_below_the_ports_that_linux_gives_to_connections(programs, job, port):
    words = preflight(programs, OUT="/ckpt", SLURM_JOB_ID=str(job)).stdout.splitlines()
    assert after(words, "--rdzv-endpoint") == [f"node7:{port}"]


def test_a_job_has_all_memory_and_all_cores_of_its_nodes(programs):
    scripts = [*SLURM.glob("*.sbatch"), ROOT / "examples" / "paper" / "job.sbatch"]
    assert len(scripts) == 3
    for script in scripts:
        assert "\n#SBATCH --exclusive\n#SBATCH --mem=0\n" in script.read_text(), script
    words = preflight(programs, OUT="/ckpt").stdout.splitlines()
    assert "--cpu-bind=none" in words[: words.index("bash")]


@pytest.mark.parametrize(
    "script", [*SLURM.glob("*.sbatch"), ROOT / "examples" / "paper" / "job.sbatch"]
)
def test_a_job_submitted_from_elsewhere_says_where_to_submit_it(programs, script, tmp_path):
    result = subprocess.run(
        ["bash", str(script), "examples/paper/base_lm.sh"],
        env={"PATH": programs, "OUT": "/ckpt"} | JOB | {"SLURM_SUBMIT_DIR": str(tmp_path)},
        **{"cwd": "/", "text": True, "capture_output": True},
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"{script.name}: error: submit from the root of the checkout, found no examples/slurm/job.sh in "
        f"{tmp_path}\n"
    )


def test_pyxis_gets_image_mounts_and_folder(programs, tmp_path):
    (tmp_path / "torch.sqsh").touch()
    container = {
        "CONTAINER_IMAGE": f"{tmp_path}/torch.sqsh",
        "CONTAINER_MOUNTS": "/data:/data,/ckpt:/ckpt",
    }
    words = preflight(programs, OUT="/ckpt", **container).stdout.splitlines()
    srun = words[: words.index("bash")]
    assert after(srun, "--container-image") == [f"{tmp_path}/torch.sqsh"]
    assert after(srun, "--container-mounts") == [f"{ROOT}:{ROOT},/data:/data,/ckpt:/ckpt"]
    assert after(srun, "--container-workdir") == [str(ROOT)]
    assert words[words.index("bash") + 1] == str(SLURM / "node.sh")


def test_an_unknown_runtime_is_refused(programs):
    container = {"CONTAINER_IMAGE": "/images/torch.sif", "CONTAINER_RUNTIME": "docker"}
    result = preflight(programs, OUT="/ckpt", **container)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "CONTAINER_RUNTIME: expected pyxis or apptainer, found docker\n"


@pytest.mark.parametrize(
    ("image", "runtime", "found"),
    [
        ("/none/torch.sqsh", "pyxis", "/none/torch.sqsh"),
        ("./none", "pyxis", f"{ROOT}/none"),
        ("none.sqsh", "pyxis", f"{ROOT}/none.sqsh"),  # Pyxis would look for it in a registry
        ("none", "apptainer", f"{ROOT}/none"),
        ("nvcr.io#nvidia/pytorch:26.01-py3", "pyxis", None),
        ("nvidia/cuda", "pyxis", None),
        ("docker://nvidia/cuda", "apptainer", None),
    ],
)
def test_an_image_that_is_a_path_must_be_there(programs, image, runtime, found):
    container = {"CONTAINER_IMAGE": image, "CONTAINER_RUNTIME": runtime}
    result = preflight(programs, OUT=f"{ROOT}/out", **container)
    if found is None:
        assert result.returncode == 0, result.stderr
        assert image in result.stdout.splitlines()
        return
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"CONTAINER_IMAGE: expected an image, found nothing at {found}\n"


@pytest.fixture
def places(tmp_path) -> Path:
    """Folders of which the first is mounted, with links in it."""
    for name in ("mounted", "other", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "qa.idx").touch()
    (tmp_path / "mounted" / "out").symlink_to(tmp_path / "other")
    (tmp_path / "mounted" / "set.idx").symlink_to(tmp_path / "data" / "set.idx")
    (tmp_path / "mounted" / "back").symlink_to(tmp_path / "mounted")
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"OUT": "{0}/mounted/new"}, None),
        ({"OUT": "{0}/mounted"}, None),
        ({"OUT": "new"}, None),  # in the checkout
        ({"OUT": "{0}/mounted/back/new"}, None),
        ({"OUT": "{0}/mounted2"}, "OUT {0}/mounted2"),
        ({"OUT": "{0}/mounted/../other"}, "OUT {0}/mounted/../other"),
        ({"OUT": "{0}/mounted/out"}, "OUT {0}/mounted/out, which leads to {0}/other"),
        ({"OUT": "new", "REAL": "1 {0}/mounted/x 2 {0}/other/qa"}, "REAL {0}/other/qa"),
        ({"OUT": "new", "TOKENIZER": "/tok.model"}, "TOKENIZER /tok.model"),
        ({"OUT": "new", "TOKENIZER": "a/b", "TOKENIZER_TYPE": "HuggingFaceTokenizer"}, None),
        ({"OUT": "/renamed/new"}, None),
    ],
)
def test_paths_that_a_container_would_not_see_are_refused(programs, places, settings, refused):
    container = {"CONTAINER_IMAGE": "nvidia/cuda"}
    container["CONTAINER_MOUNTS"] = f"{places}/mounted,{places}/data:/renamed:ro"
    settings = {name: value.format(places) for name, value in settings.items()}
    result = preflight(programs, **container, **settings)
    if refused is None:
        assert (result.returncode, result.stderr) == (0, "")
        return
    assert (result.returncode, result.stdout) == (2, "")
    name, found = refused.format(places).split(" ", 1)
    assert result.stderr == (
        f"{name}: expected a path that the container sees, below the checkout or a target of "
        f"CONTAINER_MOUNTS, found {found}\n"
    )


def test_nodes_differ_in_their_logs_address_and_who_keeps_the_rendezvous(tmp_path):
    recorder = ("x", "--flight-recorder-dump-path", "/traces/rank_")
    nodes = (("node7", "true", ()), ("node8", "false", recorder))
    for number, (node, host, flags) in enumerate(nodes):
        variables = {"SLURM_NODEID": str(number), "SLURMD_NODENAME": node, "OUT": str(tmp_path)}
        result = subprocess.run(
            ["bash", SLURM / "node.sh", "bash", "-c", "kill -USR2 $$; env", *flags],
            **{
                "env": os.environ | JOB | variables,
                "text": True,
                "capture_output": True,
                "check": True,
            },
        )
        found = dict(
            line.split("=", 1)
            for line in result.stdout.splitlines()
            if line.startswith(("PET_", "TORCH_"))
        )
        assert found["PET_LOG_DIR"] == str(tmp_path / "logs" / "30123.0" / node)
        assert Path(found["PET_LOG_DIR"]).is_dir()
        assert found["PET_LOCAL_ADDR"] == node
        assert found["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "280"
        # Megatron would take no flag beside it.
        traces = None if flags else f"{found['PET_LOG_DIR']}/nccl_trace_rank_"
        assert found.get("TORCH_FR_DUMP_TEMP_FILE") == traces
        assert found["PET_RDZV_CONF"].startswith(f"is_host={host},join_timeout=")


def test_torchrun_reads_its_flags_from_the_variables_of_a_node(monkeypatch):
    from torch.distributed.run import parse_args

    names = ("LOG_DIR", "LOCAL_ADDR", "RDZV_CONF")
    for name in names:
        monkeypatch.setenv(f"PET_{name}", f"of {name}")
    args = parse_args(["x.py"])
    assert [getattr(args, name.lower()) for name in names] == [f"of {name}" for name in names]


def test_torchrun_knows_every_flag_and_reads_how_long_a_save_may_take(programs, monkeypatch):
    from torch.distributed.launcher.api import LaunchConfig
    from torch.distributed.run import config_from_args, parse_args

    words = preflight(programs, OUT="/ckpt").stdout.splitlines()
    words = words[words.index("torch.distributed.run") + 1 :]
    # Torch 2.11 ends at flags that came later.
    assert "--shutdown-timeout" not in words
    args = parse_args(words)
    if not hasattr(LaunchConfig, "shutdown_timeout"):
        pytest.skip("this torch waits for 30 s")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "280")
    assert config_from_args(args)[0].shutdown_timeout == 280


@pytest.mark.parametrize(
    ("ending", "requeued"),
    [
        ("exit 0", False),
        ("exit 1", False),  # nothing was saved
        ("echo 4 >$OUT/latest_checkpointed_iteration.txt; exit 1", True),
        ("echo 4 >$OUT/latest_checkpointed_iteration.txt; exit 0", False),
        ("touch $OUT/preempted; exit 1", True),
        # The checkpoint is another job's.
        (
            "echo 4 >$OUT/latest_checkpointed_iteration.txt; touch $OUT/ended_for_another_run.30123; exit 1",
            False,
        ),
        # The time limit, in time for a save and too late for one.
        (
            "kill -USR1 $JOB; sleep 1; echo 4 >$OUT/latest_checkpointed_iteration.txt; exit 1",
            True,
        ),
        ("kill -USR1 $JOB; sleep 1; exit 1", False),
        (
            "kill -USR1 $JOB; sleep 0.3; kill -TERM $JOB; sleep 1; exit 1",
            False,
        ),  # cancelled in the meantime
        ("echo 4 >$OUT/latest_checkpointed_iteration.txt; kill -TERM $JOB; exit 1", False),
    ],
)
def test_a_job_is_requeued_when_it_has_more_to_do(tmp_path, ending, requeued):
    called = tmp_path / "called"
    for program in ("scontrol", "scancel"):
        executable(tmp_path / program, f'echo {program} "$@" >>{called}')
    with (tmp_path / "scontrol").open("a") as script:
        script.write('test -e "$OUT/preempted" && time=2026-11-21T15:22:48 || time=None\n')
        script.write('echo "   PreemptEligibleTime=2026-11-21T15:22:47 PreemptTime=$time"\n')
    executable(tmp_path / "recipe.sh", ending)
    result = subprocess.run(
        [
            "bash",
            "-c",
            'export JOB=$$; set -eu; source examples/slurm/job.sh; run_recipe "$OUT/recipe.sh"',
        ],
        env=JOB | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path)},
        **{"cwd": ROOT, "text": True, "capture_output": True},
    )
    assert result.returncode == int(ending[-1]), result.stderr
    calls = called.read_text().splitlines() if called.exists() else []
    assert ("scontrol requeue 30123" in calls) == requeued
    assert ("scancel --signal=TERM 30123" in calls) == ("USR1" in ending)


@pytest.fixture
def sweep(tmp_path) -> list[str]:
    """The README's two blocks about a sweep, in a world of stand-ins."""
    section = (SLURM / "README.md").read_text().partition("## Weights and seeds")[2]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[:2]
    build(tmp_path)
    for name in ("web_text_document", "code_text_document", "qa_text_document", "tok.model"):
        for suffix in (".idx", ".bin", ""):
            (tmp_path / f"{name}{suffix}").touch()
    return [
        block.replace("/data/", f"{tmp_path}/").replace("/ckpt/", f"{tmp_path}/")
        for block in blocks
    ]


def bash(script: str, **variables: str) -> str:
    result = subprocess.run(
        ["bash", "-euc", script],
        **{"cwd": ROOT, "env": variables, "text": True, "capture_output": True},
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_the_readme_s_sweep_starts_a_run_for_each_weight_and_seed(sweep, tmp_path):
    # Starts the recipe without Slurm, as a dry run without a plan.
    script = 'while case $1 in *.sbatch) false ;; esac; do shift; done; exec bash "$@"'
    executable(tmp_path / "sbatch", script)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    out = bash(sweep[0], **variables, DRY_RUN="1", PYTHON=str(tmp_path / "echo-words"))
    # The stand-in for Python prints the words of the plan again, one a line.
    runs = [line.split() for line in out.splitlines() if " --forget-data-path " in line]
    # The recipe gives the paper's weight, and what is behind it wins.
    found = {
        (words[-3], after(words, "--seed")[0], after(words, "--save")[0])
        for words in runs
        if words[-4:-3] + words[-2:] == ["--forget-weight", "--save-retain-interval", "2000"]
    }
    assert len(runs) == 9
    assert found == {
        (weight, seed, f"{tmp_path}/sweep/w{weight}/seed-{seed}")
        for weight in ("0.003", "0.01", "0.03")
        for seed in "123"
    }
    assert {after(words, "--data-cache-path")[0] for words in runs} == {f"{tmp_path}/data-cache"}


def test_the_readme_s_scores_of_a_sweep_are_joined(sweep, tmp_path):
    content = '{"results": {"mmlu": {"acc,none": 0.4}}, "settings": {"name": "%s"}}'
    write = f'printf \'{content}\' "$name" >"$output"'
    read = "while [ $# -gt 1 ]; do case $1 in --name) name=$2 ;; --output) output=$2 ;; esac; shift; done"
    real = f'*seeds.py) shift; exec {sys.executable} {ROOT}/examples/paper/seeds.py "$@" ;;'
    executable(tmp_path / "python", f"case $1 in {real} esac; {read}; {write}")
    path = f"{tmp_path}:{os.environ['PATH']}"
    out = bash(f"cd {tmp_path}; {sweep[1]}", PATH=path)
    assert "| unlearn-w0.03 | 40.0 ± 0.0 |" in out
    assert "| unlearn-w0.003 - synth, MMLU | +0.0 | +0.0 | +0.0 |" in out


def test_the_readme_s_chat_job_waits_for_the_model_that_it_tunes(tmp_path):
    text = (ROOT / "examples" / "paper" / "README.md").read_text()
    [block] = re.findall(r"^job=\$\(.*?(?=^# )", text, re.DOTALL | re.MULTILINE)
    executable(
        tmp_path / "sbatch", f'echo "$OUT $MODEL $SYNTH_LM $*" >>{tmp_path}/jobs\necho 30123'
    )
    bash(block, PATH=f"{tmp_path}:{os.environ['PATH']}")
    unlearn, chat = (tmp_path / "jobs").read_text().splitlines()
    assert unlearn.startswith("ckpt/unlearn  ckpt/start --parsable ")
    assert chat.startswith("ckpt/chat ckpt/unlearn  --dependency=afterok:30123 ")


def test_shellcheck_finds_nothing():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = sorted([*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")])
    result = subprocess.run(
        ["shellcheck", *map(str, scripts)], cwd=SLURM, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
