"""Damage to a corpus: all of a thousand mutations are detected; the check at first use runs once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.prose import documents, small_tokenizer, train_model, write_shards

from pause_megatron.cli import main
from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.first_use import check_and_record, verify_at_use
from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.records import BlockRecord
from pause_megatron.data.corpus.verify import damage_of, verify_corpus
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.digest import BlockDigests, file_digest

BLOCK = 4096
FILES = ("bin", "idx", "manifest.json")


def _in_blocks(prefix: Path) -> None:
    """Small blocks, so that a small corpus has many."""
    blocks = BlockDigests(BLOCK)
    blocks.update(Path(f"{prefix}.bin").read_bytes())
    record = BlockRecord(bytes=BLOCK, digests=blocks.digests)
    CorpusManifest.load(prefix).model_copy(update={"blocks": record}).save(prefix)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora a and b: the same documents, so the same sizes, in opposite order."""
    folder = tmp_path_factory.mktemp("verify")
    tokenizer = small_tokenizer(folder)
    for name, texts in (("a", documents(60)), ("b", documents(60)[::-1])):
        prepare([write_shards(folder / name, texts, 2)], tokenizer, folder / name / "c", workers=1)
        _in_blocks(folder / name / "c")
    load_tokenizer(train_model(folder / "other.model", vocab_size=500)).save(folder / "other.tokenizer")
    return folder


@pytest.fixture
def corpus(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "a", tmp_path / "a")
    return tmp_path / "a" / "c"


# Mutations: each changes the files of a corpus in one way that the generator draws. -----------------------------------


def _edit(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    before = bytes(content)
    change(content)
    path.write_bytes(content if content != before else before + b"\0")


def flip(prefix: Path, other: Path, rng: random.Random) -> None:
    """One bit of one file."""

    def change(content: bytearray) -> None:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)

    _edit(Path(f"{prefix}.{rng.choice(FILES)}"), change)


def zero(prefix: Path, other: Path, rng: random.Random) -> None:
    """A range of zeros, as a lost disk sector leaves it."""

    def change(content: bytearray) -> None:
        start = rng.randrange(len(content))
        stop = min(len(content), start + rng.randint(1, 512))
        content[start:stop] = bytes(stop - start)

    _edit(Path(f"{prefix}.{rng.choice(('bin', 'idx'))}"), change)


def truncate(prefix: Path, other: Path, rng: random.Random) -> None:
    path = Path(f"{prefix}.{rng.choice(FILES)}")
    os.truncate(path, rng.randrange(path.stat().st_size - 1))  # the manifest may lack its last newline


def extend(prefix: Path, other: Path, rng: random.Random) -> None:
    path = Path(f"{prefix}.{rng.choice(FILES)}")
    path.write_bytes(path.read_bytes() + (rng.randbytes(rng.randint(1, 64)).replace(b" ", b"\0").strip() or b"\0"))


def swap_blocks(prefix: Path, other: Path, rng: random.Random) -> None:
    """Two ranges of equal length, exchanged."""

    def change(content: bytearray) -> None:
        size = rng.choice([size for size in (2, 4, 8, 512, BLOCK) if len(content) >= 4 * size])
        one, two = sorted(rng.sample(range(0, len(content) - size, size), 2))
        content[one : one + size], content[two : two + size] = content[two : two + size], content[one : one + size]

    _edit(Path(f"{prefix}.{rng.choice(('bin', 'idx'))}"), change)


def wrong_header(prefix: Path, other: Path, rng: random.Random) -> None:
    """A field of the index's head: magic, version, dtype code, sequences, documents."""

    def change(content: bytearray) -> None:
        offset, form = rng.choice([(0, "<Q"), (9, "<Q"), (17, "<B"), (18, "<Q"), (26, "<Q")])
        (value,) = struct.unpack_from(form, content, offset)
        struct.pack_into(
            form, content, offset, (value + rng.choice([1, -1, 4, 100])) % (1 << 8 * struct.calcsize(form))
        )

    _edit(Path(f"{prefix}.idx"), change)


def files_of_another_corpus(prefix: Path, other: Path, rng: random.Random) -> None:
    """Some files, not all, of another corpus of the same size and tokenizer."""
    for name in rng.choice([("bin",), ("idx",), ("manifest.json",), ("bin", "idx"), ("bin", "manifest.json")]):
        shutil.copy(f"{other}.{name}", f"{prefix}.{name}")


def edited_manifest(prefix: Path, other: Path, rng: random.Random) -> None:
    """Another number, word or list entry somewhere in the manifest."""
    path = Path(f"{prefix}.manifest.json")
    value = json.loads(path.read_bytes())
    places = []

    def walk(node: object) -> None:
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(item, dict | list):
                walk(item)

    walk(value)
    node, key = rng.choice(places)
    if isinstance(node[key], int):
        node[key] += rng.choice([1, -1])
    elif isinstance(node[key], str):
        node[key] += rng.choice(["x", "0"])
    else:
        del node[key]
    path.write_text(json.dumps(value))


def another_tokenizer(prefix: Path, other: Path, rng: random.Random) -> None:
    """The folder of another tokenizer, or a flipped bit in the model."""
    folder = Path(f"{prefix}.tokenizer")
    if rng.random() < 0.3:
        shutil.rmtree(folder)
        shutil.copytree(other.parent.parent / "other.tokenizer", folder)
    else:
        flip_in = folder / "tokenizer.model"
        _edit(flip_in, lambda content: content.__setitem__(rng.randrange(len(content)), rng.randrange(256)))


def missing(prefix: Path, other: Path, rng: random.Random) -> None:
    Path(f"{prefix}.{rng.choice(FILES)}").unlink()


MUTATIONS = (
    *(flip, zero, truncate, extend, swap_blocks, wrong_header),
    *(files_of_another_corpus, edited_manifest, another_tokenizer, missing),
)


def test_no_mutation_is_undetected(original: Path, tmp_path: Path, full: bool, capsys: pytest.CaptureFixture) -> None:
    """Each is an error at opening or in the full check, and the message names the corpus."""
    at_opening = dict.fromkeys((mutation.__name__ for mutation in MUTATIONS), 0)
    by_reading, silent = dict(at_opening), []
    prefix = tmp_path / "c"
    for number in range(1000 if full else 100):
        mutation = MUTATIONS[number % len(MUTATIONS)]
        shutil.rmtree(tmp_path)
        shutil.copytree(original / "a", tmp_path)
        mutation(prefix, original / "b" / "c", random.Random(number))
        try:
            opened = open_corpus(prefix)
        except DataError as error:
            assert str(prefix) in str(error)
            at_opening[mutation.__name__] += 1
            continue
        try:
            verify_corpus(opened)
            silent.append((mutation.__name__, number))
        except DataError as error:
            assert str(prefix) in str(error) and "bytes " in str(error)
            by_reading[mutation.__name__] += 1
    if full:
        with capsys.disabled():
            for name in at_opening:
                print(
                    f"\n{name:24} refused at opening {at_opening[name]:4}, by the full check {by_reading[name]:4}",
                    end="",
                )
            print(f"\nsilent: {len(silent)}")
    assert silent == []
    open_corpus(original / "a" / "c")


def test_damaged_blocks_are_named(corpus: Path) -> None:
    size = Path(f"{corpus}.bin").stat().st_size
    blocks = -(-size // BLOCK)

    def change(content: bytearray) -> None:
        content[BLOCK] ^= 1
        content[-1] ^= 1

    _edit(Path(f"{corpus}.bin"), change)
    damage = damage_of(open_corpus(corpus))
    assert [(found.block, found.start, found.end) for found in damage] == [
        (1, BLOCK, 2 * BLOCK),
        (blocks - 1, (blocks - 1) * BLOCK, size),
    ]
    assert str(damage[0]).startswith(f"{corpus}.bin: bytes 4,096 to 8,192 (block 2 of {blocks}): altered")


def test_blocks_do_not_depend_on_the_size_of_writes(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(10_000)
    for block_bytes in (1, 999, 1000, 10_000, 20_000):
        (tmp_path / "x").write_bytes(content[:block_bytes])
        for cut in (1, 7, 1000, 10_000):
            blocks = BlockDigests(block_bytes)
            for start in range(0, len(content), cut):
                blocks.update(content[start : start + cut])
            assert len(blocks.digests) == -(-len(content) // block_bytes)
            assert blocks.digests[0] == file_digest(tmp_path / "x")


def test_manifests_of_the_first_version_are_still_read(corpus: Path) -> None:
    path = Path(f"{corpus}.manifest.json")
    value = json.loads(path.read_bytes())
    for name in ("blocks", "digest", "adoption"):
        del value[name]
    path.write_text(json.dumps({**value, "version": 1}))
    opened = open_corpus(corpus)
    verify_corpus(opened)
    assert opened.manifest.blocks is None
    _edit(Path(f"{corpus}.bin"), lambda content: content.__setitem__(9, content[9] ^ 1))
    with pytest.raises(DataError, match=r"c\.bin: bytes 0 to [\d,]+: altered"):
        verify_corpus(open_corpus(corpus))


def test_the_verb_continues_after_a_damaged_corpus(corpus: Path, original: Path, capsys: pytest.CaptureFixture) -> None:
    _edit(Path(f"{corpus}.idx"), lambda content: content.__setitem__(50, content[50] ^ 1))
    assert main(["verify", f"{corpus}", f"{original}/b/c", f"{corpus}x"]) == 1
    first, second, third, fourth, fifth = capsys.readouterr().out.splitlines()
    assert first == f"DAMAGED  {corpus}" and second.startswith(f"  {corpus}.idx: bytes 0 to ")
    assert third.startswith(f"whole    {original}/b/c: 60 documents, ")
    assert fourth == f"UNKNOWN  {corpus}x" and "no corpus at" in fifth
    assert main(["verify", f"{original}/b/c"]) == 0
    assert main(["verify", f"{corpus}x", f"{original}/b/c"]) == 2


# At first use ---------------------------------------------------------------------------------------------------------


def test_once_until_the_files_change(corpus: Path, tmp_path: Path) -> None:
    def use(mode: str = "once", cache: Path | None = None) -> bool:
        return verify_at_use(open_corpus(corpus), mode, cache)

    assert not use("never") and not (corpus.parent / "cache").exists()
    assert use() and not use() and use("always") and not use("never")
    assert use(cache=tmp_path / "cache") and not use(cache=tmp_path / "cache")
    os.utime(f"{corpus}.bin")
    assert use() and not use()
    before = Path(f"{corpus}.bin").stat().st_mtime_ns
    _edit(Path(f"{corpus}.bin"), lambda content: content.__setitem__(9, content[9] ^ 1))
    for _ in range(2):  # the failure is not cached
        with pytest.raises(DataError, match=r"(?s)is damaged.*c\.bin: bytes"):
            use()
    _edit(Path(f"{corpus}.bin"), lambda content: content.__setitem__(9, content[9] ^ 1))
    os.utime(f"{corpus}.bin", ns=(before, before))
    assert not use()


def test_the_verb_writes_the_record_that_a_start_checks_for(corpus: Path, tmp_path: Path) -> None:
    """After verification no start reads data or takes a lock, until a file changes."""

    def use(cache: Path | None = None) -> bool:
        read = []
        reading = verify_at_use(open_corpus(corpus), "once", cache, report=lambda *report: read.append(report))
        assert reading == bool(read)
        return reading

    for cache, arguments in ((None, []), (tmp_path / "records", ["--cache", f"{tmp_path}/records"])):
        assert main(["verify", f"{corpus}", *arguments]) == 0
        assert not use(cache)
        assert [path.suffix for path in (cache or corpus.parent / "cache").iterdir()] == [".verified"]
    (tmp_path / "link").symlink_to(corpus.parent)
    assert not verify_at_use(open_corpus(tmp_path / "link" / "c"), "once")
    os.utime(f"{corpus}.idx")
    assert use() and not use()


@pytest.mark.parametrize("finder", ["verb", "always"])
def test_damage_invalidates_the_record(corpus: Path, finder: str) -> None:
    assert verify_at_use(open_corpus(corpus), "once")
    times = {path: path.stat().st_mtime_ns for path in [Path(f"{corpus}.bin")]}
    _edit(Path(f"{corpus}.bin"), lambda content: content.__setitem__(9, content[9] ^ 1))
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))
    assert not verify_at_use(open_corpus(corpus), "once")  # as after a silent disk error
    if finder == "verb":
        assert main(["verify", f"{corpus}"]) == 1
    else:
        with pytest.raises(DataError, match="is damaged"):
            verify_at_use(open_corpus(corpus), "always")
    with pytest.raises(DataError, match="is damaged"):
        verify_at_use(open_corpus(corpus), "once")


def test_a_waiting_process_shows_progress_and_needs_no_lock(corpus: Path) -> None:
    """Another process holds the lock throughout; the record is enough to release the waiting process."""
    opened, said, result = open_corpus(corpus), [], []
    assert verify_at_use(opened, "once")
    (lock,) = corpus.parent.glob("cache/*.lock")
    lock.with_suffix(".verified").unlink()
    with open(lock, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate()  # left by the previous reader
        file.write(json.dumps(["verify c (process 7 on n3)", 5, 9]).encode())
        file.flush()
        report = lambda *report: said.append(report)  # noqa: E731
        thread = threading.Thread(target=lambda: result.append(verify_at_use(opened, "once", report=report)))
        thread.start()
        deadline = time.monotonic() + 100
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert check_and_record(opened) == []
        thread.join(100)
    assert result == [False]
    assert set(said) == {("verify c (process 7 on n3)", 5, 9)}


def test_a_file_system_without_locks(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process per machine reads, with a lock in its temporary folder."""
    flock, asked = fcntl.flock, []

    def refused(descriptor: int, operation: int) -> None:
        asked.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent)
        if asked[-1] == corpus.parent / "cache":
            raise OSError(errno.ENOSYS, "no locks")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert verify_at_use(open_corpus(corpus), "once")
    assert asked == [corpus.parent / "cache", tmp_path / f"pause-megatron-{os.getuid()}"]
    assert not verify_at_use(open_corpus(corpus), "once")


def test_a_folder_that_cannot_be_written(corpus: Path) -> None:
    (corpus.parent / "file").touch()
    said: list[str] = []
    assert verify_at_use(open_corpus(corpus), "once", corpus.parent / "file" / "cache", warn=said.append)
    assert len(said) == 1 and "data.cache" in said[0]


_PROCESS = """
import sys, time
from pathlib import Path
from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.first_use import check_and_record, verify_at_use
from pause_megatron.errors import DataError
corpus = open_corpus(sys.argv[1])
Path(f"{sys.argv[2]}.ready").touch()
while not Path(sys.argv[1] + ".go").exists():
    time.sleep(0.001)
try:
    # slowly, so that the others wait
    print(verify_at_use(corpus, "once", report=lambda stage, done, total: time.sleep(0.02)))
except DataError as error:
    print(str(error).splitlines()[-1])
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_one_process_reads_and_the_others_wait(corpus: Path, tmp_path: Path, damaged: bool) -> None:
    if damaged:
        _edit(Path(f"{corpus}.bin"), lambda content: content.__setitem__(9, content[9] ^ 1))
    processes = [
        subprocess.Popen([sys.executable, "-c", _PROCESS, corpus, tmp_path / str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("*.ready"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    Path(f"{corpus}.go").touch()
    said = sorted(process.communicate(timeout=100)[0].strip() for process in processes)
    if damaged:
        assert len(set(said)) == 1 and "c.bin: bytes 0 to 4,096 (block 1 of" in said[0]
    else:
        assert said == ["False", "False", "True"]
