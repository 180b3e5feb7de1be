"""CONTRIBUTING.md and CITATION.cff: paths exist, versions are the package's, hooks and CI run the same checks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pause_megatron import __version__
from pause_megatron.config.load import recipe_names

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACEHOLDERS = re.compile(r"\b(NAME|FOLDER|FILE)\b")


def section(heading: str) -> str:
    return TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def paths(text: str) -> list[str]:
    """Words in back quotes that are paths of this repository; a placeholder stands for a name of the reader's."""
    tops = {path.name for path in ROOT.iterdir()}
    found = re.findall(r"`([\w./-]+)`", text)
    return [path for path in found if path.split("/")[0] in tops and ("/" in path or "." in path)]


CHANGES = re.findall(r"^\| ([^|]+) \| (`.+`) \|$", section("I want to change X: the files are"), re.MULTILINE)


def test_the_table_of_changes_has_at_least_ten_rows():
    assert len(CHANGES) >= 10 and len({what for what, _ in CHANGES}) == len(CHANGES)


@pytest.mark.parametrize(("what", "files"), CHANGES)
def test_the_files_of_a_change_exist(what, files):
    named = files.strip("`").split("`, `")
    assert paths(files) == named, "every file is a path from the top of the repository"
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_path_of_the_page_exists():
    missing = [path for path in paths(TEXT) if not PLACEHOLDERS.search(path) and not (ROOT / path).exists()]
    folders = [str(Path(path).parent) for path in paths(TEXT) if PLACEHOLDERS.search(path)]
    assert missing == [] and [folder for folder in folders if not (ROOT / folder).is_dir()] == []
    assert len(paths(TEXT)) > 60


def test_every_name_in_the_steps_exists():
    """What the steps tell the reader to extend is in the file that the step names."""
    for path, names in re.findall(r"^\d\. `([\w/]+\.py)`: (.+)$", TEXT, re.MULTILINE):
        text = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"`([A-Za-z_]\w+)(?:\.(\w+))?`", names):
            absent = [word for word in name if word and not re.search(rf"\b{word}\b", text)]
            assert absent == [] or name[0] in ("model_type", "transformers"), f"{path}: {absent}"


def test_the_release_checklist_names_every_file_that_holds_the_version():
    assert "`setup.py`" in section("Release checklist")
    for name in ("pause_megatron/__init__.py", "CITATION.cff", "CHANGELOG.md"):
        assert f"`{name}`" in section("Release checklist")
        assert __version__ in (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", __version__)
    (paper,) = citation["references"]
    assert paper["authors"][0]["family-names"] == "Goyal" and paper["type"] == "conference-paper"
    assert "2310.02226" in paper["url"] and "2310.02226" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_hooks_and_ci_run_the_same_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lint = (ROOT / "launchers" / "lint.sh").read_text(encoding="utf-8")
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "mypy"]
    assert all(f"check {hook['name']}" in lint and hook["language"] == "system" for hook in hooks)
    assert "bash launchers/lint.sh\nbash launchers/test.sh\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_recipe_has_a_source_in_a_comment():
    folder = ROOT / "pause_megatron" / "recipes"
    assert [name for name in recipe_names() if "#" not in (folder / f"{name}.yaml").read_text(encoding="utf-8")] == []
