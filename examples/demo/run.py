#!/usr/bin/env python
"""The whole method on a laptop: pre-train, continue on synthetic text, unlearn it, measure.

    python examples/demo/run.py --output-dir runs/demo
    python examples/demo/run.py --output-dir runs/imported --model FOLDER   # of a Hugging Face model

Every stage is a call of a real tool, printed before it runs; a second call goes on where the first was
stopped. Text comes from the Python standard library, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.demo.report import write_report  # noqa: E402
from examples.demo.stages import PRESETS, Settings, Stage, choose_device, stages  # noqa: E402

SCORED = re.compile(r"has \d+ of \d+ models$")  # what analyze.py says after each
# Megatron's console line; with gradient ascent the sum of the terms is negative and stands elsewhere.
ITERATION = re.compile(r"iteration +(\d+)/ +(\d+) .*?(?:lm loss|replay loss): ([0-9.E+-]+)")


def run_stage(stage: Stage, out: Path, digest: str) -> None:
    """Run a stage unless it is finished; its output goes to a log file, its progress to the screen."""
    log = out / "logs" / f"{stage.name}.log"
    started, finished = (out / state / stage.name for state in ("started", "finished"))
    if finished.is_file() and finished.read_text() == digest:
        print(f"== {stage.title}: finished before", flush=True)
        return
    print(f"\n== {stage.title}\n$ {_printable(stage.command)}", flush=True)
    for path in (started, finished, log):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not (started.is_file() and started.read_text() == digest):
        # Checkpoints and losses of other settings must not be gone on with.
        for stale in (out / stage.name, out / "tensorboard" / stage.name):
            shutil.rmtree(stale, ignore_errors=True)
        started.write_text(digest)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("w") as sink:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            code = _follow(process, stage, sink)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code != 0:
        tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
        sys.exit(f"{tail}\nerror: stage {stage.name} ended with exit code {code}; the log is {log}")
    finished.write_text(digest)


def _follow(process: subprocess.Popen[str], stage: Stage, sink: object) -> int:
    """Copy a process's output to its log, and show steps as a bar and short tools' lines as they are."""
    assert process.stdout is not None
    # A bar that goes to a file is drawn rarely.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    bar = None
    if stage.steps:
        bar = tqdm(total=stage.steps, unit="step", dynamic_ncols=True, mininterval=interval)
    for line in process.stdout:
        print(line, end="", file=sink, flush=True)  # type: ignore[call-overload]
        if bar is None:
            _show(stage, line.rstrip())
            continue
        if match := ITERATION.search(line):
            bar.set_postfix_str(f"loss {float(match[3]):.3f}", refresh=False)
            bar.update(int(match[1]) - bar.n)
    if bar is not None:
        bar.close()
    return process.wait()


def _show(stage: Stage, line: str) -> None:
    """A line of a tool; of the one that runs models how far it is, for the report has its table."""
    if stage.name != "perplexity" or SCORED.search(line):
        print(f"   {line}", flush=True)


def _printable(command: list[str]) -> str:
    """The command as one would type it in the root of the checkout."""
    words = [word.replace(f"{ROOT}/", "") for word in command]
    words[0] = os.path.relpath(command[0], ROOT) if command[0].startswith(str(ROOT)) else "python"
    return shlex.join(words)


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`chosen_settings` reads."""
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of a Hugging Face model that becomes BaseLM, instead of training one",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the steps, to try it out"
    )


def chosen_settings(
    settings: Settings, parser: argparse.ArgumentParser, options: argparse.Namespace
) -> Settings:
    """A preset as the options change it; what is no model is named."""
    if options.model is not None:
        if not (options.model / "config.json").is_file():
            parser.error(
                "--model: expected the folder of a Hugging Face model, found no config.json in "
                f"{options.model}"
            )
        settings = settings.of_model(str(options.model.resolve()))
    return settings if options.scale == 1 else settings.scaled(options.scale)


def main() -> None:
    """Run every stage and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--preset", choices=PRESETS, default="laptop")
    add_size_options(parser)
    options = parser.parse_args()
    settings = chosen_settings(PRESETS[options.preset], parser, options)
    choose_device(settings)
    out = options.output_dir.resolve()
    started = time.monotonic()
    digest = ""
    for stage in stages(out, settings):
        digest = stage.digest(digest)
        run_stage(stage, out, digest)
    print(write_report(out, settings))
    print(
        f"\n{time.monotonic() - started:.0f} s. To look at the losses: tensorboard --logdir {out}/tensorboard"
    )


if __name__ == "__main__":
    # A stage that runs must not go on alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on from here")
