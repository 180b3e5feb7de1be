"""Lines and shards that are wrong, each with the kind that it must be counted as, and good ones in odd dress."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

BAD_LINES = [
    (b"", "blank-line"),
    (b"  \t\r", "blank-line"),
    (b'{"text": "caf\xe9"}', "invalid-utf8"),
    (b'{"text": "\xed\xa0\x80"}', "invalid-utf8"),
    (b'{"text": "overlong \xc0\xaf"}', "invalid-utf8"),
    (b"\xff\xfe{\x00", "invalid-utf8"),
    (b"\0" * 4096, "null-bytes"),
    (b'{"text": "a\0b"}', "null-bytes"),
    ('{"text": "UTF-16"}'.encode("utf-16-le"), "null-bytes"),
    (b"not json", "not-json"),
    (b'{"text": "cut', "not-json"),
    (b'{"text": "two"} {"text": "values"}', "not-json"),
    (b'{"text": "garbage behind"}]', "not-json"),
    (b'{"text": "two\rlines of an old Mac"}\r{"text": "x"}', "not-json"),
    (b"{'text': 'python'}", "not-json"),
    (b'{"text": "a", }', "not-json"),
    (b'{"text": "control \x01"}', "not-json"),
    (b'{"text": "bad \\x escape"}', "not-json"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not-json"),
    (b"[" * 100_000, "too-deep"),
    (b'{"text": "x", "tree": ' + b"[" * 5000 + b"]" * 5000 + b"}", "too-deep"),
    (b'{"a":' * 201 + b"1" + b"}" * 201, "too-deep"),
    (b"null", "not-object"),
    (b"NaN", "not-object"),
    (b"[]", "not-object"),
    (b'["text"]', "not-object"),
    (b'"text"', "not-object"),
    (b"{}", "no-text"),
    (b'{"Text": "case"}', "no-text"),
    (b'{"meta": {"text": "one level down"}}', "no-text"),
    (b'{"text": "one", "text": "two"}', "two-texts"),
    (b'{"text": null}', "text-not-string"),
    (b'{"text": 7}', "text-not-string"),
    (b'{"text": NaN}', "text-not-string"),
    (b'{"text": ["a"]}', "text-not-string"),
    (b'{"text": {"a": 1}}', "text-not-string"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n\\t\\u00a0 "}', "empty"),
    (b'{"text": "half \\ud83d pair"}', "lone-surrogate"),
    (b'{"text": "\\udc00\\ud800 wrong way round"}', "lone-surrogate"),
]

# A good line may look like this too.
DRESSES: list[Callable[[str], bytes]] = [
    lambda text: json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b/"}).encode(),
    lambda text: json.dumps({"url": "\u2028", "text": text}, ensure_ascii=False).encode(),
    lambda text: json.dumps({"text": text}).encode() + b"\r",
    lambda text: b"\xef\xbb\xbf" + json.dumps({"text": text}).encode(),
    lambda text: b" \t" + json.dumps({"text": text, "score": float("nan"), "other": [float("-inf")]}).encode(),
    lambda text: b'{"a": 1, "a": 2, "meta": {"text": "no"}, "text": ' + json.dumps(text).encode() + b"}",
    lambda text: b'{"tree": ' + b"[" * 150 + b"]" * 150 + b', "text": ' + json.dumps(text).encode() + b"}",
    lambda text: b'{"brackets": "' + b"[{" * 300 + b'", "text": ' + json.dumps(text).encode() + b"}",
    lambda text: json.dumps({"text": text, "nul": "\0"}).encode(),
]


def mixed_lines(texts: list[str], bad: int, rng: random.Random) -> list[tuple[bytes, str | None]]:
    """Lines of `texts` in order with `bad` malformed ones strewn in; each with its kind, None for a good one."""
    kinds = [BAD_LINES[number % len(BAD_LINES)] for number in range(bad)]
    rng.shuffle(kinds)
    slots = sorted(rng.randrange(len(texts) + 1) for _ in range(bad))
    lines: list[tuple[bytes, str | None]] = []
    taken = 0
    for number, text in enumerate(texts):
        while taken < bad and slots[taken] <= number:
            lines.append(kinds[taken])
            taken += 1
        lines.append((rng.choice(DRESSES)(text), None))
    return lines + kinds[taken:]


def long_line(path: Path, megabytes: int) -> None:
    """A .gz of one line of this length and a good one, in a file of a few KiB a megabyte."""
    member = _gzip(b"a" * 1_000_000)
    path.write_bytes(_gzip(b'{"text": "') + member * megabytes + _gzip(b'"}\n{"text": "after it"}\n'))


def _gzip(content: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=31)
    return compressor.compress(content) + compressor.flush()


def cut_gzip(content: bytes) -> bytes:
    """A .gz that ends in the middle, all of `content` readable before the cut."""
    compressor = zlib.compressobj(wbits=31)
    whole = compressor.compress(content) + compressor.flush(zlib.Z_FULL_FLUSH)
    return whole + compressor.compress(b'{"text": "lost' * 1000) + compressor.flush()[:20]


def damaged_shards(folder: Path, lines: list[bytes]) -> None:
    """Shards `9*` that break off, each a way of its own; those that can hold text begin with one of `lines`."""
    content = [line + b"\n" for line in lines]
    (folder / "90-cut.jsonl.gz").write_bytes(cut_gzip(content[0]))
    (folder / "91-garbage-behind.jsonl.gz").write_bytes(_gzip(content[1]) + b"<html>error</html>")
    (folder / "92-pointer.jsonl.gz").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "93-empty.jsonl.gz").touch()
    (folder / "94-empty.jsonl.zst").touch()
    (folder / "95-folder.jsonl").mkdir()
    (folder / "96-link.jsonl").symlink_to("nowhere")
    (folder / "97-unreadable.jsonl").symlink_to("/proc/self/mem")  # opens, and cannot be read, not even by root
    (folder / "98-flipped.jsonl.gz").write_bytes(_gzip(content[2]) + _flipped(_gzip(content[2] * 50)))


def _flipped(content: bytes) -> bytes:
    return content[:12] + bytes([content[12] ^ 0xFF]) + content[13:]


DAMAGED_SHARDS = 9
