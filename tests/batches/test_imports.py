"""Imports go one way: dataset.py -> batches -> corpus -> common."""

import ast

import pytest
from conftest import ROOT

MODULES = sorted((ROOT / "batches").glob("*.py"))
PROJECT = {path.stem for path in ROOT.glob("*.py")}
PROJECT |= {path.parent.name for path in ROOT.glob("*/*.py")}


def imported_modules(path):
    """Yield the full names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    used = {name.split(".")[0] for name in imported_modules(path)} & PROJECT
    assert used <= {"batches", "corpus", "common"}


def test_there_is_no_cycle():
    edges = {f"batches.{path.stem}": set(imported_modules(path)) for path in MODULES}
    while edges:
        leaves = [name for name in edges if not edges[name] & edges.keys()]
        assert leaves, f"a cycle among {sorted(edges)}"
        for name in leaves:
            del edges[name]
