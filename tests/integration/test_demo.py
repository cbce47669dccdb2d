"""The demo as a user starts it, with a hundredth of the steps."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tests.helpers import llama
from tests.helpers.entry import ROOT

DEMO = [sys.executable, "examples/demo/run.py", "--scale", "0.01", "--output-dir"]
MODELS = ("BaseLM", "SynthLM", "UnlearnLM")


def demo(directory, *, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*DEMO, str(directory)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    return directory, demo(directory).stdout


def test_ends_with_table_plots_and_verdict(finished):
    directory, output = finished
    for model in ("BaseLM", "SynthLM", "UnlearnLM", "UnlearnLM (GA)"):
        assert f"\n{model} " in output
    assert "perplexity.json has 4 of 4 models\n" in output
    # So few steps teach nothing: the demo must say that the pattern does not show.
    assert "NOT SEEN" in output
    assert "Part of the paper's pattern does not show in this run" in output
    for picture in ("losses.png", "perplexity.png"):
        assert (directory / picture).read_bytes().startswith(b"\x89PNG")


def test_prints_each_command_as_it_can_be_typed(finished):
    _, output = finished
    commands = [line for line in output.splitlines() if line.startswith("$ ")]
    assert len(commands) == 12  # text, tokenizer, 5 data sets, 4 models, perplexities
    assert sum("pretrain_unlearn.py" in command for command in commands) == 4
    assert str(ROOT) not in "".join(commands)


def test_second_call_reuses_what_is_finished(finished):
    directory, _ = finished
    again = demo(directory).stdout
    assert again.count("finished before") == 12
    assert "$ " not in again
    # A stage that is lost is run again, and nothing else.
    lost = directory / "data" / "instruction_text_document.idx"
    lost.unlink()
    (directory / "finished" / "data-instruction").unlink()
    # So is one whose end was cut off: its outputs are there.
    for stage in ("corpus", "perplexity"):
        (directory / "finished" / stage).unlink()
    assert demo(directory).stdout.count("finished before") == 9
    assert lost.is_file()


def test_the_sweep_goes_on_from_the_demo(finished, tmp_path):
    directory, _ = finished
    sweep = [sys.executable, "examples/demo/sweep.py", "--scale", "0.01", "--only", "ascent-0.1"]
    sweep += ["--output-dir", str(tmp_path / "sweep"), "--demo-dir"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    refused = subprocess.run([*sweep, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "--demo-dir: expected a finished demo" in refused.stderr
    done = subprocess.run([*sweep, str(directory)], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    _, _, base, synth, ascent = (tmp_path / "sweep" / "table.md").read_text().splitlines()
    # SynthLM is compared with itself nowhere; the run began at it, so its KL is small but not 0.
    assert [cell.strip() for cell in synth.split("|")][5:] == ["", "", "", ""]
    assert ascent.startswith("| gradient ascent | 0.1 |")
    assert 0 < float(ascent.split("|")[-2]) < 1
    assert " ± " in base
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    # What the demo made is left as it was.
    assert json.loads((directory / "perplexity.json").read_text())["models"].keys() == {
        str(directory / name) for name in ("base", "synth", "unlearn", "unlearn-ga")
    }


def test_failed_stage_names_its_log(finished, tmp_path):
    directory, _ = finished
    shutil.copytree(directory, tmp_path / "copy", symlinks=True)
    copy = tmp_path / "copy"
    for stage in (copy / "finished").iterdir():
        stage.unlink()
    (copy / "text").rename(copy / "elsewhere")
    (copy / "text").write_text("a file where a folder should be")
    done = demo(copy, check=False)
    assert done.returncode == 1
    assert "error: stage corpus ended with exit code" in done.stderr
    assert "logs/corpus.log" in done.stderr


def test_a_stage_ends_with_the_demo(tmp_path):
    with subprocess.Popen(
        [*DEMO, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        stages: list[psutil.Process] = []
        while not stages:
            assert process.poll() is None
            time.sleep(0.05)
            stages = psutil.Process(process.pid).children()
        process.terminate()
        assert b"interrupted; the same command goes on from here" in process.stderr.read()
    assert process.returncode == 1
    psutil.wait_procs(stages, timeout=30)
    assert not any(stage.is_running() for stage in stages)


def test_begins_from_a_model_of_hugging_face(tmp_path):
    model = llama.save(tmp_path / "model", dtype=torch.bfloat16, max_position_embeddings=1024)
    command = [*DEMO, str(tmp_path / "demo"), "--model"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    refused = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--model: expected the folder of a Hugging Face model, found no config" in refused.stderr
    done = subprocess.run(
        [*command, str(model)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    commands = [line for line in lines if line.startswith("$ ")]
    assert len(commands) == 15  # text, import, 5 data sets, 3 models, perplexities, 4 to be asked
    assert sum("pretrain_unlearn.py" in command for command in commands) == 3
    assert sum("--bf16" in command and "--seq-length 512" in command for command in commands) == 3
    said = [line.split()[0] for line in lines if line.startswith(MODELS)]
    assert said == [*MODELS, "UnlearnLM"] * 6  # the table, and five prompts
    assert "> User: What is the capital of France?" in lines
    assert (tmp_path / "demo" / "losses.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run([*command, str(model)], cwd=ROOT, capture_output=True, text=True)
    assert again.stdout.count("finished before") == 15
