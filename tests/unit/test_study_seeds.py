"""The page that joins several seeds of the miniature study, from files made up here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.paper.seed_scores import read_folders, score_page
from megatron_ext.exceptions import ConfigError, DataError

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


def write_scores(folder, percent, rating, judge="J"):
    """Files of the three verbs for two models, and one of `analyze.py`."""
    folder.mkdir(parents=True)
    for model, more in (("synth", 0), ("unlearn", 10)):
        files = {
            f"harness-{model}": {
                "results": {"mmlu": task(percent + more)},
                "settings": {"name": model},
            },
            f"followbench-{model}": {
                "summary": {
                    "ssr": {"mean": percent + more},
                    "hsr": {"mean": percent - more},
                    "unparsable": 2 if more else 0,
                },
            },
            f"mt-bench-{model}": {"scores": {"all": {"mean": rating, "unparsable": 0}}},
        }
        for name, content in files.items():
            if not name.startswith("harness"):
                kind = {"benchmark": name.removesuffix(f"-{model}"), "model": model}
                content |= kind | {"judge": {"model": judge}}
            (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "perplexity.json").write_text('{"verb": "perplexity", "models": {}}')


def test_scores_of_any_study_are_joined_over_its_seeds(tmp_path):
    folders = [tmp_path / f"seed-{number}" for number in (1, 2, 3)]
    for folder, percent, rating in zip(folders, (40, 42, 44), (5.0, 5.5, 6.0), strict=True):
        write_scores(folder, percent, rating)
    (folders[2] / "harness-unlearn.json").unlink()
    text = score_page(read_folders(folders), "synth")
    [heads] = [line for line in text.splitlines() if line.startswith("| model ")]
    assert heads == "| model | FollowBench SSR | FollowBench HSR | MMLU | MT-Bench |"
    expected = ["42.0 ± 2.0", "42.0 ± 2.0", "42.0 ± 2.0", "5.50 ± 0.50"]
    assert cells(text, "synth") == expected
    # One seed lacks a score: said, and not taken for nothing.
    expected = ["52.0 ± 2.0", "32.0 ± 2.0", "51.0 ± 1.4 (2 of 3)", "5.50 ± 0.50"]
    assert cells(text, "unlearn") == expected
    change = cells(text, "unlearn - synth, FollowBench HSR")
    assert change == ["-10.0"] * 3 + ["-10.0 ± 0.0", "0 of 3"]
    change = cells(text, "unlearn - synth, MMLU")
    assert change == ["+10.0", "+10.0", "", "+10.0 ± 0.0 (2 of 3)", "2 of 2"]
    assert "seed-1, unlearn, FollowBench SSR: 2 verdicts could not be read" in text


def test_folders_that_are_no_seeds_of_a_study_are_refused(tmp_path):
    one, two = tmp_path / "seed-1", tmp_path / "seed-2"
    write_scores(one, 40, 5.0)
    write_scores(two, 40, 5.0, judge="K")
    message = "seed-2: expected J as the judge of FollowBench SSR, as in the other folders, found K"
    with pytest.raises(DataError, match=message):
        read_folders([one, two])
    with pytest.raises(ConfigError, match="--folders: expected a folder a seed, found one twice"):
        read_folders([one, one])
    with pytest.raises(DataError, match=r"none: expected files of `evaluate.py`"):
        read_folders([one, tmp_path / "none"])
    with pytest.raises(ConfigError, match="--before: expected one of synth, unlearn, found sinth"):
        score_page(read_folders([one]), "sinth")
    (one / "again.json").write_text((one / "harness-synth.json").read_text())
    with pytest.raises(
        DataError, match=r"harness-synth.json: expected benchmarks without a score yet"
    ):
        read_folders([one])
    (one / "again.json").write_text("{")
    with pytest.raises(DataError, match=r"again.json: expected a JSON file"):
        read_folders([one])
