"""Folders of task records and web text: those made for the tests, and real ones where they lie beside the repository.

A folder holds one folder a task, as `--task-path` expects it, and `c4` with lines like C4's.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

MADE = Path(__file__).resolve().parents[1] / "assets" / "records"
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
FOLDERS = {"made": MADE} | ({"real": REAL} if REAL.is_dir() else {})


def c4_shards(folder: Path) -> list[Path]:
    """Shards of lines like C4's under a folder of records, in order."""
    return sorted(folder.glob("c4/*.json*"))


def c4_texts() -> Iterator[str]:
    """Text of every line like C4's that there is."""
    for folder in FOLDERS.values():
        for path in c4_shards(folder):
            content = path.read_bytes()
            lines = (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()
            yield from (json.loads(line)["text"] for line in lines)
