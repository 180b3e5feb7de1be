"""The API reference is built from the docstrings, and what is built is not committed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launchers" / "api.py"


def test_the_reference_has_a_page_for_every_module_below(tmp_path):
    pytest.importorskip("pdoc")
    modules = ["pause_megatron.config", "pause_megatron.data.windows.pause"]
    words = [sys.executable, str(SCRIPT), "--output", str(tmp_path), *modules]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")}
    config = {f"pause_megatron/config/{path.stem}.html" for path in (ROOT / "pause_megatron/config").glob("[a-z]*.py")}
    assert pages == {"index.html", "pause_megatron/config.html", "pause_megatron/data/windows/pause.html", *config}
    page = (tmp_path / "pause_megatron/data/windows/pause.html").read_text()
    assert "PlacementPolicy" in page and "<h6" in page  # the Google sections are headings


def test_without_pdoc_one_line_names_what_to_install(tmp_path):
    (tmp_path / "pdoc.py").write_text("raise ModuleNotFoundError('no pdoc', name='pdoc')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "api"), "pause_megatron.errors"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the API reference needs pdoc: pip install -e '.[docs]'\n"


def test_the_reference_is_not_committed():
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()
