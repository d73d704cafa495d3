"""Imports go one way, scripts -> training -> batches -> corpus -> common, and without a cycle."""

import ast
import re

import pytest
from conftest import ROOT

import batches
import common
import corpus
import training

PACKAGES = (common, corpus, batches, training)
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package.__name__).glob("*.py"))]
PROJECT = {path.stem for path in ROOT.glob("*.py")}
PROJECT |= {path.parent.name for path in ROOT.glob("*/*.py")}
MAY_IMPORT = {
    "common": {"common"},
    "corpus": {"corpus", "common"},
    "batches": {"batches", "corpus", "common"},
    "training": {"training", "batches", "corpus", "common", "model"},
}


def name_of(path):
    return f"{path.parent.name}.{path.stem}"


def imported_modules(path):
    """Yield the full names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    used = {name.split(".")[0] for name in imported_modules(path)} & PROJECT
    assert used <= MAY_IMPORT[path.parent.name]


def test_there_is_no_cycle():
    edges = {name_of(path): set(imported_modules(path)) for path in MODULES}
    while edges:
        leaves = [name for name in edges if not edges[name] & edges.keys()]
        assert leaves, f"a cycle among {sorted(edges)}"
        for name in leaves:
            del edges[name]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_package_says_in_what_order_to_read_its_modules(package):
    """Its docstring names each module."""
    named = set(re.findall(r"\w+\.py", package.__doc__))
    modules = {path.name for path in MODULES if path.parent.name == package.__name__}
    assert modules - {"__init__.py"} <= named
