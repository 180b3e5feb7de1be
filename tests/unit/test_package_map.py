"""pause_megatron/README.md: its map has every folder, its picture is the import table, its keys exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from test_imports import DATA, NO_TORCH, RANKS

PACKAGE = Path(__file__).resolve().parents[2] / "pause_megatron"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    return README.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def folders() -> set[str]:
    """Folders that hold modules or YAML files, as the map writes them."""
    files = [path for pattern in ("*.py", "*.yaml") for path in PACKAGE.rglob(pattern)]
    return {f"{path.parent.relative_to(PACKAGE)}/" for path in files if path.parent != PACKAGE}


def test_the_map_has_every_folder_once_and_nothing_else():
    rows = re.findall(r"^\| `([\w/]+/)` \| (.+) \|$", section("The map"), re.MULTILINE)
    names = [name for name, _ in rows]
    assert set(names) == folders() and len(names) == len(set(names))
    assert [name for name, meaning in rows if len(meaning) < 20 or len(meaning) > 110] == []
    modules = {path.name for path in PACKAGE.glob("[a-z]*.py")}
    assert set(re.findall(r"`(\w+\.py)` \(", section("The map"))) == modules


def test_the_picture_is_the_import_table():
    block = section("Who imports whom").split("```")[1]
    drawn = {name: int(row) for row, *names in map(str.split, block.strip().splitlines()) for name in names}
    assert drawn == RANKS


def test_the_order_of_data_and_the_torch_free_layers_are_those_of_the_table():
    text = section("Who imports whom").replace("\n", " ")
    assert f"imports those before it: {', '.join(DATA)}." in text
    listed = re.search(r"start instantly: ([\w, ]+) and the modules of row 0", text)[1].split(", ")
    modules = {name for name in NO_TORCH if RANKS[name] == 0 and (PACKAGE / f"{name}.py").exists()}
    assert {*listed, *modules} == NO_TORCH


def test_every_key_of_the_glossary_exists():
    from pause_megatron.config.schema import RunConfig

    keys = set(re.findall(r"`((?:pause|data|finetune)\.\w+)", section("Glossary")))
    assert keys
    fields = {
        f"{name}.{key}" for name, field in RunConfig.model_fields.items() for key in field.annotation.model_fields
    }
    assert keys <= fields


def test_the_public_names_are_listed_once_and_the_script_uses_them():
    import pause_megatron

    text = section("From Python")
    rows = re.findall(r"^\| (`.+`) \| .+ \|$", text, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(pause_megatron.__all__)
    script = ast.parse(text.split("```")[1].removeprefix("python\n"))
    (imported,) = (node for node in script.body if isinstance(node, ast.ImportFrom))
    assert {alias.name for alias in imported.names} <= set(names)
