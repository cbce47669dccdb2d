"""The page that joins several seeds of the miniature study, from files made up here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[2] / "examples/paper/seeds.py"
MODELS = (
    *("base_lm", "synth_lm", "mix_synth_lm", "non_synth_lm", "synth_lm_u33b"),
    *("refine_lm", "unlearn_lm", "unlearn_lm_ga", "unlearn_lm_u33b"),
)
# How far a model's log-perplexity is from BaseLM's, whatever the text.
SHIFTS = {"synth_lm": -0.5, "unlearn_lm": -0.1, "unlearn_lm_ga": 30.0, "refine_lm": -0.5}


def task(percent):
    return {"acc,none": percent / 100, "acc_stderr,none": 0.01}


def write_seed(study, number):
    directory = study / f"seed-{number}"
    (directory / "done").mkdir(parents=True)
    (directory / "done/report").touch()
    rng = np.random.default_rng(number)
    text = {name: rng.normal(5, 1, 200) for name in ("real", "synthetic", "instruction")}
    models = {}
    for model in MODELS:
        # SynthLM's samples lie closer together.
        narrow = 0.5 if model == "synth_lm" else 1.0
        sets = {
            name: {"loss": list(5 + narrow * (loss - 5) + SHIFTS.get(model, 0.0))}
            for name, loss in text.items()
        }
        models[model] = {"label": model, "sets": sets}
        for suffix in ("", "_chat"):
            results = {
                name: task(10)
                for name in ("demo_sums", "demo_definitions", "demo_definitions_seen")
            }
            if suffix:
                followed = {"base_lm": 50, "synth_lm": 30, "unlearn_lm": 31 + 10 * number}.get(
                    model, 40
                )
                results["demo_instructions"] = task(followed)
            (directory / f"scores_{model}{suffix}.json").write_text(
                json.dumps({"results": results})
            )
    (directory / "perplexity.json").write_text(json.dumps({"verb": "perplexity", "models": models}))


def run(study, output):
    command = [sys.executable, str(SCRIPT), "--study", str(study), "--output-dir", str(output)]
    return subprocess.run(command, capture_output=True, text=True)


def cells(text, start):
    """The cells of the row that begins with some words."""
    (row,) = re.findall(rf"^\| {re.escape(start)} \| (.*) \|$", text, re.MULTILINE)
    return row.split(" | ")


def test_page(tmp_path):
    for number in (0, 1, 2):
        write_seed(tmp_path / "study", number)
    done = run(tmp_path / "study", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "miniature.md").read_text()
    assert (tmp_path / "miniature.png").read_bytes().startswith(b"\x89PNG")
    row = cells(text, "synth_lm - base_lm, instruction")
    assert row[0] == "below 0"
    assert all(-0.75 < float(value) < -0.25 for value in row[1:4])
    assert row[5] == "3 of 3"
    assert cells(text, "synth_lm / base_lm, instruction, variance")[1:] == [
        *["0.25"] * 3,
        "0.25 ± 0.00",
        "3 of 3",
    ]
    assert cells(text, "unlearn_lm_ga - unlearn_lm, real")[4:] == ["+30.10 ± 0.00", "3 of 3"]
    # Nothing differs: it does not appear, and is not left out.
    nothing = cells(text, "mix_synth_lm - non_synth_lm, instruction")
    assert nothing == ["below 0", *["+0.00 (no)"] * 3, "+0.00 ± 0.00", "0 of 3"]
    # One point is within the error of both scores, eleven and twenty-one are not.
    found = cells(text, "unlearn_lm_chat - synth_lm_chat, instructions followed")
    assert found == ["above 0", "+1.0 (no)", "+11.0", "+21.0", "+11.0 ± 10.0", "2 of 3"]
    assert cells(text, "unlearn_lm_chat")[0] == "41.0 ± 10.0"


def test_an_unfinished_run_is_refused(tmp_path):
    write_seed(tmp_path / "study", 1)
    (tmp_path / "study/seed-1/done/report").unlink()
    done = run(tmp_path / "study", tmp_path)
    assert done.returncode == 2
    assert "seed-1: expected a finished run of the study" in done.stderr
    assert not (tmp_path / "miniature.md").exists()


def test_no_runs(tmp_path):
    done = run(tmp_path / "nothing", tmp_path)
    assert done.returncode == 2
    assert "expected folders seed-1" in done.stderr
