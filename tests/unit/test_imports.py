"""Import rules between folders, and words that the package must not contain, from the sources."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pause_megatron"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Lower layers know nothing of higher ones; layers of equal rank know nothing of each other, except what is listed.
RANKS = {
    **{
        "errors": 0,
        "moved": 0,
        "seeds": 0,
        "versions": 0,
        "host": 0,
        "files": 0,
        "terminal": 0,
        "run_folder": 0,
        "config": 0,
    },
    **{"slurm": 1, "objective": 1, "data": 1, "tasks": 1, "distributed": 1, "model": 1, "engine": 1},
    **{
        "checkpoint": 2,
        "train": 3,
        "hf": 4,
        "megatron_lm": 5,
        "inference": 5,
        "evaluate": 6,
        "plan": 6,
        "experiment": 7,
        "benchmark": 7,
        "score": 7,
    },
    **{"cli": 8, "__main__": 9},
}
NEIGHBOURS = {
    *{
        ("host", "errors"),
        ("host", "terminal"),
        ("files", "errors"),
        ("files", "host"),
        ("files", "terminal"),
        ("terminal", "errors"),
        ("run_folder", "files"),
    },
    *{("config", "errors"), ("config", "files"), ("config", "run_folder")},
    *{("model", "distributed"), ("engine", "distributed")},
    *{("data", "objective"), ("model", "objective")},
    ("tasks", "data"),  # one reader of JSON lines
}
# The steps of the data's way, in their order: a folder of data/ imports those before it.
DATA = ("text", "tokenizer", "corpus", "prepare", "adopt", "batches", "windows", "stream", "supervised")
NO_TORCH = {
    *("config", "errors", "experiment", "files", "host", "moved", "plan", "run_folder", "seeds", "slurm", "tasks"),
    *("terminal", "versions"),
}
FORBIDDEN = ("allow_pickle=True", "weights_only=False", "trust_remote_code=True", "shell=True", "yaml.load(")


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Full names of every import of a file, inside functions too; relative ones are resolved."""
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_check():
    assert {layer(path) for path in SOURCES} - {"__init__"} <= set(RANKS)
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_table(path):
    own = layer(path)
    for name in imports(path):
        parts = name.split(".")
        if own in NO_TORCH:
            assert parts[0] not in ("torch", "deepspeed", "megatron", "numpy"), f"{own} must stay instant: {name}"
        other = parts[1] if parts[0] == PACKAGE.name and len(parts) > 1 else own
        if own == "__init__" or other == own or other not in RANKS:
            continue
        assert RANKS[other] < RANKS[own] or (own, other) in NEIGHBOURS, f"{own} may not import {name}"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "data").rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_data_is_imported_along_its_way(path):
    own = path.relative_to(PACKAGE).parts[1]
    assert own in DATA or own == "__init__.py"
    for name in imports(path):
        parts = name.split(".")
        if parts[:2] == [PACKAGE.name, "data"] and own in DATA:
            assert parts[2] in DATA[: DATA.index(own) + 1], f"data/{own} may not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_forbidden_words(path):
    text = "".join(path.read_text(encoding="utf-8").split())
    assert [word for word in FORBIDDEN if word in text] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_start_alike(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    if path.name == "__init__.py" and not body:
        return
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant), "a module says what it is for"
    if path.name != "__init__.py":
        assert ast.unparse(body[1]) == "from __future__ import annotations"


EACH_FIRST = """
import importlib, sys
first, others = (part.split() for part in sys.argv[1:])
for name in [*first, *others]:
    for old in [module for module in sys.modules if name in first and module.partition(".")[0] == "pause_megatron"]:
        del sys.modules[old]
    importlib.import_module(name)
    heavy = {"torch", "deepspeed", "megatron", "transformers"} & set(sys.modules)
    assert not heavy, f"{name} imports {heavy}"
"""


def at_the_top(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports when it is imported itself: not in functions, not for types alone."""
    nodes = list(ast.parse(path.read_text(encoding="utf-8")).body)
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def module_of(path: Path) -> str:
    return ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def test_no_modules_import_each_other():
    # A package is not counted as an import of its modules' packages: those hold docstrings and lazy names.
    graph = {
        name: {other for other in at_the_top(path) if other != name and not name.startswith(f"{other}.")}
        for name, path in MODULES.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the modules


def test_each_module_without_torch_can_be_the_first_that_is_imported():
    """No circle shows only to who begins elsewhere."""
    names = [name for name, path in MODULES.items() if layer(path) in NO_TORCH]
    first = [name for name in names if name.count(".") < 2]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EACH_FIRST, " ".join(first), " ".join(names)],
        check=True,
        cwd=PACKAGE.parent,
    )
