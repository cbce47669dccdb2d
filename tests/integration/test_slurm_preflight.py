"""What preflight.sbatch asks of the nodes, with stand-ins for Slurm, and what it leaves in the log."""

import pytest

from tests.helpers.recipes import after, executable
from tests.helpers.slurm import preflight, stand_ins


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
