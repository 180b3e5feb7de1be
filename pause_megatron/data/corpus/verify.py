"""Reading a corpus whole and comparing every byte with its manifest's digests, at the speed of the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pause_megatron.data.corpus.corpus import Corpus
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.errors import DataError

# What is being read, bytes done, bytes in all.
Report = Callable[[str, int, int], None]

_READ_BYTES = 4 << 20


def no_report(stage: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Damage:
    """Bytes `start` to `end` (not included) of a file that are not what `prepare` wrote."""

    path: Path
    start: int
    end: int
    block: int
    blocks: int
    reason: str

    def __str__(self) -> str:
        where = f" (block {self.block + 1:,} of {self.blocks:,})" if self.blocks > 1 else ""
        return f"{self.path}: bytes {self.start:,} to {self.end:,}{where}: {self.reason}"


def damage_of(corpus: Corpus, report: Report = no_report) -> list[Damage]:
    """Every damaged block of a corpus, in order; an `.idx` (and a `.bin` of an old manifest) is one block.

    Args:
        corpus: opened, so the sizes are right.
        report: called after every few MiB.
    """
    manifest = corpus.manifest
    total = sum(record.bytes for record in manifest.files.values())
    done = 0

    def on_read(size: int) -> None:
        nonlocal done
        done += size
        report(f"verify {Path(corpus.prefix).name}", done, total)

    found: list[Damage] = []
    for name, record in manifest.files.items():
        digests, block_bytes = [record.digest], max(record.bytes, 1)
        if name == "bin" and manifest.blocks is not None:
            digests, block_bytes = manifest.blocks.digests, manifest.blocks.bytes
        found += _damaged_blocks(path_of(corpus.prefix, name), record.bytes, digests, block_bytes, on_read)
    return found


def verify_corpus(corpus: Corpus, report: Report = no_report) -> None:
    """Read `.bin` and `.idx` whole.

    Raises:
        DataError: a byte differs from what `prepare` wrote; every damaged range is named.
    """
    refuse(corpus, damage_of(corpus, report))


def refuse(corpus: Corpus, damage: Sequence[Damage]) -> None:
    """Raise a DataError that names every damaged range, where there is one."""
    if damage:
        raise DataError(described(corpus, damage))


def described(corpus: Corpus, damage: Sequence[Damage]) -> str:
    """What is wrong and what to do, a line for every damaged range."""
    lines = "\n  ".join(map(str, damage))
    verb = corpus.manifest.made_by
    return f"corpus {corpus.prefix} is damaged; copy it again, or {verb} it with --overwrite:\n  {lines}"


def _damaged_blocks(
    path: Path, size: int, digests: Sequence[str], block_bytes: int, on_read: Callable[[int], None]
) -> Iterator[Damage]:
    buffer = memoryview(bytearray(min(_READ_BYTES, block_bytes)))
    for number, expected in enumerate(digests):
        start, end = number * block_bytes, min((number + 1) * block_bytes, size)
        try:
            came = _digest(path, start, end, buffer, on_read)
            reason = f"altered since it was prepared (expected {expected}, came {came})"
        except OSError as error:
            came, reason = None, f"cannot be read ({error.strerror})"
        if came != expected:
            yield Damage(path, start, end, number, len(digests), reason)


def _digest(path: Path, start: int, end: int, buffer: memoryview, on_read: Callable[[int], None]) -> str:
    """Digest of a range of bytes; of less where the file has become shorter."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end and (read := file.readinto(buffer[: min(end - start, len(buffer))])):
            hasher.update(buffer[:read])
            start += read
            on_read(read)
    return f"xxh3_128:{hasher.hexdigest()}"
