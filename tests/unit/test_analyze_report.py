"""The report: measured values, what got worse, the paper's rows apart, and nothing from outside."""

import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_ext.analysis.embedding_report import measure_embeddings
from megatron_ext.analysis.perplexity_report import add_shifts
from megatron_ext.exceptions import MegatronExtError
from tools.analyze import main

N = 200
MODELS = ("base", "synth", "unlearn")
DATA = {
    "prefix": "data/x",
    "documents": 12345,
    "tokens": 678901,
    "content_sha256": None,
    "sampled_sha256": "a1b2c3d4e5f60718" + "0" * 48,
    "tokenizer_sha256": None,
}
MEANS = {  # of the log-perplexity, by set and model
    "instruction": (3.0, 2.5, 2.8),
    "synthetic": (4.0, 1.0, 3.5),
    "real": (3.0, 3.0, 3.2),
}


def perplexity_file():
    rng = np.random.default_rng(1)
    report = {"verb": "perplexity", "data": dict.fromkeys(MEANS, DATA), "models": {}}
    samples = {name: rng.normal(0, 0.5, N) for name in MEANS}
    for number, label in enumerate(MODELS):
        sets = {}
        for name, means in MEANS.items():
            loss = means[number] + samples[name] + rng.normal(0, 0.02, N)
            sets[name] = {"loss": loss.tolist(), "corpus_perplexity": float(np.exp(loss.mean()))}
        run = {
            "settings": {"lr": 0.001 * (number + 1), "seed": 77, "mitigation_weight": 0.0},
            "data": {
                "--data-path": [{"weight": 0.25, **DATA}, {"prefix": "gone", "missing": "why"}]
            },
        }
        report["models"][f"runs/{label}"] = {
            "label": label,
            "iteration": 40 + number,
            "digest": f"digest{number}",
            "run": run,
            "sets": sets,
        }
    add_shifts(report, seed=1)
    return report


def tokens_file():
    token = {"piece": "<b>&Answer", "structural": True, "token": 7, "peak": 7, "ratio": 123.4}
    token |= {"low": 50.0, "high": 300.0, "count": 4321, "baseline_count": 3, "rate": 0.1}
    token |= {"baseline_rate": 0.001, "documents": 0.987, "baseline_documents": 0.01}
    data = DATA | {"content_sha256": "0123456789abcdef" + "0" * 48}
    curve = {"documents": 10, "tokens": 20, "density": [0.1] * 8, "data": data}
    overuse = {"structural_share": 0.1, "baseline_structural_share": 0.001, "tokens": [token]}
    report = {"verb": "tokens", "baseline": "real", "grid": list(range(8)), "drawn_bandwidth": 1.0}
    report |= {"settings": {"bandwidth": 1.0}, "sets": {"real": curve, "qa": curve}}
    return report | {"overuse": {"qa": overuse}}


def embeddings_file(model):
    rng = np.random.default_rng(2)
    sets = {"real": rng.normal(size=(30, 4)), "qa": rng.normal(size=(30, 4)) + 5}
    report = {"verb": "embeddings", "model": model, "sets": {"other": DATA}}
    return report | measure_embeddings(sets, seed=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    perplexity = perplexity_file()
    task = {"acc,none": 0.5, "acc_stderr,none": 0.01}
    after = {"mmlu": task | {"acc,none": 0.52}, "gsm8k": {"exact_match,strict": 0.114}}
    contents = {
        "perplexity": perplexity,
        "tokens": tokens_file(),
        "embeddings": embeddings_file(perplexity["models"]["runs/base"]),
        "before": {"results": {"mmlu": task, "gsm8k": {"exact_match,strict": 0.166}}},
        "after": {"results": after},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    with SummaryWriter(str(folder / "losses")) as writer:
        for step in range(1, 4):
            writer.add_scalar("forget loss", 0.5 / step, step)
            writer.add_scalar("learning-rate", 1.0, step)
    return folder


def report(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["analyze.py", "report", *map(str, arguments)])
    main()


def flags(files):
    return (
        *("--tokens", files / "tokens.json", "--embeddings", files / "embeddings.json"),
        *("--perplexity", files / "perplexity.json", "--losses", f"unlearn={files}/losses"),
        *("--evaluation", f"synth={files}/before.json", f"unlearn={files}/after.json"),
        *("--before", "synth", "--after", "unlearn"),
        *("--forgotten", "synthetic", "--instruction", "instruction"),
    )


class Page(HTMLParser):
    """What a browser would fetch, whether tags close, and the rows and findings as text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.rows, self.findings = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.sources += [found[key] for key in ("src", "href", "action") if key in found]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append(([], found.get("class")))
        if tag == "li":
            self.findings.append([found["class"], ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][0].append(data)
        if "li" in self.open:
            self.findings[-1][1] += data


@pytest.fixture(scope="module")
def page(files):
    with pytest.MonkeyPatch.context() as monkeypatch:
        report(monkeypatch, *flags(files), "--output", files / "report.html")
    assert (files / "report-losses.png").read_bytes().startswith(b"\x89PNG")
    text = (files / "report.html").read_text()
    assert "http" not in text
    assert "url(" not in text
    return Page(text)


def test_nothing_from_outside(page):
    # Density, over-use, a map, three densities and one loss.
    assert len(page.sources) == 7
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in page.sources)


def findings(page, start):
    return [(kind, text) for kind, text in page.findings if start in text]


def test_what_got_worse_and_what_did_not(page):
    ((kind, text),) = findings(page, "unlearn against synth, real")
    assert kind == "worse"
    assert "rises by 22." in text  # exp(0.2)
    ((kind, _),) = findings(page, "unlearn against synth, synthetic")
    assert kind == "better"  # it was to be forgotten
    ((kind, text),) = findings(page, "unlearn against synth, instruction")
    assert kind == "better"
    assert "moved it by -39." in text  # exp(-0.5)
    assert "-17." in text  # exp(-0.2)
    assert findings(page, "synth against base, real")[0][1].count("no measurable change") == 1
    ((kind, text),) = findings(page, "MMLU")
    assert (kind, "within the noise of ±2.77" in text) == ("note", True)
    ((kind, text),) = findings(page, "GSM8K")
    # Without errors nobody can say whether that is a change.
    assert (kind, "16.60 before, 11.40 after (-5.20); the noise" in text) == ("note", True)
    # Worse stands first.
    kinds = [kind for kind, _ in page.findings]
    assert kinds == sorted(kinds, key=["worse", "better", "note"].index)


def test_tables_hold_what_was_measured(page):
    rows = [cells for cells, _ in page.rows]
    assert ["<b>&Answer", "123.4", "50.0 to 300.0", "4,321", "3", "98.7%", "1.0%"] in rows
    mean = np.mean(perplexity_file()["models"]["runs/synth"]["sets"]["synthetic"]["loss"])
    (row,) = (row for row in rows if row[0] == "synthetic, synth")
    assert row[2] == f"{mean:.3f}"
    assert row[4].startswith("-3.0")
    assert ["unlearn, forget loss", "1 - 3", "0.5", "0.1667"] in rows
    assert ["lr", "0.001", "0.002", "0.003"] in rows
    assert ["mitigation_weight", "0"] in rows
    data = ["base", "--data-path", "data/x", "0.25", "12,345", "678,901"]
    assert [*data, "a1b2c3d4e5f60718 (sampled)", "unknown"] in rows
    assert ["qa", "data/x", "12,345", "678,901", "0123456789abcdef", "unknown"] in rows
    assert any("not there any more: why" in row for row in rows)


def test_rows_of_the_paper_are_set_apart(page):
    synth = ["paper: SynthLM", "47.71", "47.56", "47.27", "18.90", "18.40", "16.60", "32.74"]
    assert (synth, "other") in page.rows
    assert (["unlearn", "-", "-", "52.00 ± 1.00", "-", "-", "11.40", "-"], None) in page.rows
    assert sum(style == "other" for _, style in page.rows) == 5  # no chat scores, no chat rows


def test_the_tool_says_what_it_wrote(files, tmp_path, monkeypatch, capsys):
    output = tmp_path / "report.html"
    picture, losses = tmp_path / "report-losses.png", ("--losses", f"a={files}/losses")
    picture.write_text("old")
    with pytest.raises(MegatronExtError, match=r"report-losses\.png exists: give --overwrite"):
        report(monkeypatch, *losses, "--output", output)
    report(monkeypatch, *losses, "--output", output, "--overwrite")
    assert capsys.readouterr().out == f"{output}, {picture}\n"


def test_report_without_unlearning(files, tmp_path, monkeypatch):
    output = tmp_path / "r.html"
    report(monkeypatch, "--perplexity", files / "perplexity.json", "--output", output)
    page = Page(output.read_text())
    assert {kind for kind, _ in page.findings} == {"note"}
    assert len(page.findings) == 6  # two models against the base on three sets


def test_bad_inputs(files, tmp_path, monkeypatch):
    perplexity = ("--perplexity", files / "perplexity.json")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    cases = {
        "expected a file to report on": (),
        "nowhere.json: expected a JSON file, found nothing": ("--tokens", "nowhere.json"),
        "broken.json: expected a JSON file": ("--tokens", tmp_path / "broken.json"),
        "expected a file of `analyze.py tokens`, found one of perplexity": (
            *("--tokens", files / "perplexity.json"),
        ),
        "--losses: expected NAME=PREFIX": ("--losses", "x"),
        "expected the losses of a run": ("--losses", f"x={tmp_path}/empty"),
        "--before: expected one of base, synth, unlearn, found synt": (
            *(*perplexity, "--before", "synt"),
        ),
        "--forgotten: expected one of instruction, real, synthetic, found qa": (
            *(*perplexity, "--forgotten", "qa"),
        ),
        "expected benchmarks without a score yet, found GSM8K again": (
            *("--evaluation", f"x={files}/before.json", f"x={files}/after.json"),
        ),
        "--after: expected --before": (*perplexity, "--after", "synth"),
    }
    for message, arguments in cases.items():
        with pytest.raises(MegatronExtError, match=message):
            report(monkeypatch, *arguments, "--output", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
