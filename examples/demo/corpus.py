"""The demo's text, made from what every CPython has: no download, the same files on every run.

    python examples/demo/corpus.py --output-dir DIR

- `real.jsonl`: documentation topics, docstrings and source code of the standard library.
- `synthetic.jsonl`: question-answer pairs in one rigid format, made from docstrings and arithmetic.
  Like the synthetic data of arXiv 2406.12397, its format is far narrower than its content.
- `real_heldout.jsonl`, `synthetic_heldout.jsonl`: the same from modules, topics and sums of their own.
- `instruction.jsonl`: requests and replies in varied wording, made from yet other modules and
  numbers. It is never trained on.

A module, with all that is made from it, goes to one split only, by a hash of its name.
"""

import argparse
import ast
import hashlib
import inspect
import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.demo import wording
from megatron_ext.data.atomic import AtomicFiles

Split = Literal["train", "heldout", "instruction"]
Corpus = dict[str, list[str]]

NAMES = ("real", "synthetic", "real_heldout", "synthetic_heldout", "instruction")
# Tests, applications, bundled packages, and code that is data: tables of encodings and of the build.
_SKIPPED = re.compile(
    r"(^|/)(test|tests|idlelib|idle_test|lib2to3|turtledemo|ensurepip|encodings|pydoc_data|site-packages"
    r"|dist-packages|lib-dynload|config-[^/]*|__pycache__|__phello__)(/|$)"
    r"|(^|/)(_sysconfigdata[^/]*|this|antigravity|__hello__|entities|_pyrepl)\.py$"
)
_SOURCE_CHARACTERS = 6000  # of a source document: longer files are cut between top-level statements
_SUMS: dict[Split, int] = {
    "train": 6000,
    "heldout": 300,
    "instruction": 150,
}  # how many of each split


@dataclass(frozen=True)
class Entry:
    """A documented module, class or function."""

    module: str
    name: str  # with its module
    kind: Literal["module", "class", "function", "method"]
    signature: str
    doc: str

    @property
    def lead(self) -> str:
        """The first sentence of the docstring on one line; empty if it does not read as one."""
        paragraph = " ".join(self.doc.split("\n\n")[0].split())
        sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]
        reads = (
            30 <= len(sentence) <= 220 and sentence[0].isupper() and re.search(r"[^.]\.$", sentence)
        )
        return sentence if reads and not re.search(r"->|=>|::|[<>{}|]", sentence) else ""


@dataclass(frozen=True)
class Module:
    """A module of the standard library, parsed and not imported."""

    name: str
    entries: list[Entry]
    source: list[str]


def split_of(name: str) -> Split:
    """The split of a module or topic: of 100, 88 for training, 7 held out, 5 for instructions."""
    bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "train" if bucket < 88 else "heldout" if bucket < 95 else "instruction"


def standard_library() -> Iterator[Module]:
    """Parses the modules of the running Python, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if _SKIPPED.search(relative):
            continue
        text = path.read_text(encoding="utf-8", errors="strict")
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a template, not a module
            continue
        name = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield Module(name, list(_entries(tree, name)), list(_source(tree, text)))


def _entries(tree: ast.Module, module: str) -> Iterator[Entry]:
    """Docstrings of a module, its public classes, functions and methods."""

    def visit(node: ast.AST, prefix: str, inside_class: bool) -> Iterator[Entry]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if child.name.startswith("_"):
                continue
            name, is_class = f"{prefix}.{child.name}", isinstance(child, ast.ClassDef)
            if doc := ast.get_docstring(child, clean=True):
                kind = "class" if is_class else "method" if inside_class else "function"
                arguments = (
                    "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                )
                yield Entry(module, name, kind, f"{child.name}{arguments}", doc.strip())
            if is_class:
                yield from visit(child, name, True)

    if doc := ast.get_docstring(tree, clean=True):
        yield Entry(module, module, "module", module, doc.strip())
    yield from visit(tree, module, False)


def _source(tree: ast.Module, text: str) -> Iterator[str]:
    """Source without docstrings (documents of their own), cut between top-level statements."""
    lines = text.splitlines()
    dropped: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            # A body of a docstring alone keeps it: without it the code would not parse.
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and len(body) > 1:
                dropped.update(range(body[0].lineno, (body[0].end_lineno or body[0].lineno) + 1))
    part: list[str] = []
    for number, line in enumerate(lines, start=1):
        if number in dropped:
            continue
        starts_statement = line[:1] not in ("", " ", "\t", "#", ")", "]", "}")
        if starts_statement and sum(map(len, part)) > _SOURCE_CHARACTERS:
            yield _tidy(part)
            part = []
        part.append(line.rstrip())
    if sum(map(len, part)) > 100:
        yield _tidy(part)


def _tidy(lines: list[str]) -> str:
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"


def _reference(module: Module) -> Iterator[str]:
    """The docstrings of a module as pages of reference documentation."""
    page = ""
    for entry in module.entries:
        title = entry.name if entry.kind == "module" else f"{entry.kind} {entry.signature}"
        page += f"{title}\n\n{inspect.cleandoc(entry.doc)}\n\n"
        if len(page) > _SOURCE_CHARACTERS:
            yield page.rstrip() + "\n"
            page = ""
    if len(page) > 200:
        yield page.rstrip() + "\n"


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def split_sums(further: int = 0) -> dict[str, list[wording.Sum]]:
    """Different problems for each split, and further ones, that no file of the corpus holds, as `further`."""
    sizes: dict[str, int] = {**_SUMS, "further": further}
    sums = iter(wording.distinct_sums(sum(sizes.values()), random.Random(1)))
    return {name: list(islice(sums, size)) for name, size in sizes.items()}


def build_corpus() -> Corpus:
    """Builds all documents; within a split their order is shuffled with a fixed seed."""
    documents: Corpus = {name: [] for name in NAMES}
    real: dict[Split, list[str]] = {
        "train": documents["real"],
        "heldout": documents["real_heldout"],
        # Modules kept for instructions are in no other file, or perplexity would see them twice.
        "instruction": [],
    }
    answers: dict[Split, list[Entry]] = {"train": [], "heldout": [], "instruction": []}
    for topic, text in _topics():
        real[split_of(f"topic {topic}")].append(text.strip() + "\n")
    for module in standard_library():
        split = split_of(module.name)
        real[split] += [*_reference(module), *module.source]
        answers[split] += [entry for entry in module.entries if entry.lead]
    sums = split_sums()
    rng = random.Random(2)
    synthetic: dict[str, Split] = {"synthetic": "train", "synthetic_heldout": "heldout"}
    for name, split in synthetic.items():
        documents[name] += [
            wording.question_about(e.kind, e.name, e.module, e.lead) for e in answers[split]
        ]
        documents[name] += [wording.question_sum(item, rng) for item in sums[split]]
    documents["instruction"] += [
        wording.instruction_about(e.kind, e.name, e.module, e.lead, rng)
        for e in answers["instruction"]
    ]
    documents["instruction"] += [wording.instruction_sum(item, rng) for item in sums["instruction"]]
    return _deduplicated(documents)


def _deduplicated(documents: Corpus) -> Corpus:
    """Each document once over all files; evaluation files come first, so that they lose nothing."""
    seen: set[str] = set()
    kept: Corpus = {}
    for name in reversed(NAMES):
        kept[name] = [text for text in dict.fromkeys(documents[name]) if text not in seen]
        seen.update(kept[name])
        random.Random(name).shuffle(kept[name])
    return {name: kept[name] for name in NAMES}


def write_corpus(documents: Corpus, directory: Path, *, overwrite: bool) -> list[Path]:
    """Writes the files together, or none; returns their paths."""
    paths = [directory / f"{name}.jsonl" for name in NAMES]
    with AtomicFiles(paths, overwrite=overwrite) as files:
        for path, name in zip(paths, NAMES, strict=True):
            for text in documents[name]:
                files[path].write((json.dumps({"text": text}, ensure_ascii=False) + "\n").encode())
        files.commit()
    return paths


def main() -> None:
    """Builds and writes the corpus, and prints its sizes."""
    parser = argparse.ArgumentParser(description="Make the demo's text from the standard library.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    args = parser.parse_args()
    documents = build_corpus()
    paths = write_corpus(documents, args.output_dir, overwrite=args.overwrite)
    print(f"{'file':<26}{'documents':>10}{'bytes':>12}")
    for path, texts in zip(paths, documents.values(), strict=True):
        print(f"{path.name:<26}{len(texts):>10,}{sum(len(t.encode()) for t in texts):>12,}")


if __name__ == "__main__":
    from tools.common import run_tool

    run_tool(main)
