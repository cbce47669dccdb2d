"""The packages of `megatron_ext` import each other one way, also where an import waits for a call."""

import ast
import graphlib
from pathlib import Path

from tests.helpers.entry import ROOT

PACKAGE = "megatron_ext"


def _imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names]
        else:
            names = [getattr(node, "module", None) or ""]
        found |= {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}
    return found


def test_packages_import_each_other_one_way():
    graph: dict[str, set[str]] = {}
    for file in (ROOT / PACKAGE).rglob("*.py"):
        parts = file.relative_to(ROOT / PACKAGE).with_suffix("").parts
        graph.setdefault(parts[0], set()).update(_imported(file) - {parts[0]})
    assert {"losses", "checkpoint"} <= graph["frozen"] | graph["head"]
    assert "training" not in graph["losses"]
    graphlib.TopologicalSorter(graph).prepare()  # raises where there is a cycle
