"""Preparing a corpus: stock megatron-core reads the tokenizer's ids, after any interruption."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from support.prose import documents, json_lines, small_tokenizer, train_model, write_shards
from support.records import FOLDERS, c4_shards, c4_texts

from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.verify import verify_corpus
from pause_megatron.data.prepare.pool import PrepareProgress
from pause_megatron.data.prepare.run import prepare, summary
from pause_megatron.data.text.hub import HubOptions
from pause_megatron.data.text.sources import ReadOptions
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError

TEXTS = documents(240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepare")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return small_tokenizer(folder)


@pytest.fixture(scope="module")
def shards(folder: Path) -> str:
    return write_shards(folder / "shards", TEXTS, 6)


@pytest.fixture(scope="module")
def reference(folder: Path, shards: str, tokenizer: Tokenizer) -> dict[str, bytes]:
    prepare([shards], tokenizer, folder / "reference", workers=1)
    return _files(folder / "reference")


def _files(prefix: Path) -> dict[str, bytes]:
    """Everything at a prefix, by the name after it."""
    found = {}
    for path in prefix.parent.rglob("*"):
        name = str(path.relative_to(prefix.parent))
        if path.is_file() and name.startswith(f"{prefix.name}."):
            found[name.removeprefix(prefix.name)] = path.read_bytes()
    return found


def _read(prefix: Path) -> list[list[int]]:
    corpus = IndexedDataset(str(prefix))
    assert corpus.document_indices.tolist() == list(range(len(corpus) + 1))
    return [corpus[number].tolist() for number in range(len(corpus))]


def test_the_stock_reader_returns_each_document_with_its_eod(folder: Path, reference, tokenizer: Tokenizer) -> None:
    assert _read(folder / "reference") == [[*tokenizer.encode(text), tokenizer.eod] for text in TEXTS]
    assert set(reference) == {".bin", ".idx", ".manifest.json", *(f".tokenizer/{n}" for n in _TOKENIZER_FILES)}
    manifest = CorpusManifest.load(folder / "reference")
    assert manifest.counts.documents == len(TEXTS)
    assert manifest.counts.tokens * 2 == len(reference[".bin"])
    assert manifest.counts.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert [record.counts.documents for record in manifest.sources] == [40] * 6
    verify_corpus(open_corpus(folder / "reference", tokenizer))


_TOKENIZER_FILES = ("tokenizer.model", "pause_tokenizer.json")


def test_bytes_are_those_of_the_stock_builder(folder: Path, reference, tokenizer: Tokenizer) -> None:
    builder = IndexedDatasetBuilder(str(folder / "stock.bin"), dtype=np.uint16)
    for text in TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(folder / "stock.idx"))
    assert (folder / "stock.bin").read_bytes() == reference[".bin"]
    assert (folder / "stock.idx").read_bytes() == reference[".idx"]


def test_workers_do_not_change_a_byte(tmp_path: Path, shards: str, reference, tokenizer: Tokenizer) -> None:
    prepare([shards], tokenizer, tmp_path / "c", workers=3)
    assert _files(tmp_path / "c") == reference


@pytest.mark.parametrize(("count", "suffix"), [(1, ".jsonl"), (11, ".jsonl.zst"), (4, ".json")])
def test_shards_do_not_change_the_tokens(
    tmp_path: Path, count: int, suffix: str, reference, tokenizer: Tokenizer
) -> None:
    prepare([write_shards(tmp_path / "s", TEXTS, count, suffix)], tokenizer, tmp_path / "c", workers=1)
    files = _files(tmp_path / "c")
    assert (files[".bin"], files[".idx"]) == (reference[".bin"], reference[".idx"])


def test_datasets_gives_the_same_tokens(tmp_path: Path, folder: Path, reference, tokenizer: Tokenizer) -> None:
    files = tuple(sorted(map(str, (folder / "shards").iterdir())))
    hub = HubOptions(data_files=files)
    prepared = prepare(["hf:json"], tokenizer, tmp_path / "c1", hub=hub, workers=2)
    assert len(prepared.manifest.sources) == 6
    assert (tmp_path / "c1.bin").read_bytes() == reference[".bin"]
    again = prepare(["hf:json"], tokenizer, tmp_path / "c1", hub=hub)
    assert again.already_done


def test_c4_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """C4's escapes (slashes, characters outside ASCII) are characters in the corpus; lines keep their order."""
    shards = [str(path) for folder in FOLDERS.values() for path in c4_shards(folder)]
    prepare(shards, tokenizer, tmp_path / "c4", workers=1)
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in c4_texts()]
    assert _read(tmp_path / "c4") == expected
    assert len(expected) >= 24
    assert any("https://threads.example/faq" in tokenizer.decode(ids[:-1]) for ids in expected[:24])


def test_literal_pause_never_becomes_the_id(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines(["<pause>", "a<pause><pause> b", "</s> <s> <unk>"] * 50))
    prepare([str(path)], tokenizer, tmp_path / "c", workers=1)
    for ids in _read(tmp_path / "c"):
        assert max(ids) < tokenizer.pause_id
        assert ids.count(tokenizer.eod) == 1 and ids[-1] == tokenizer.eod


def test_dtype_follows_the_vocabulary_and_the_pause_id(tmp_path: Path, shards: str, folder: Path, tokenizer) -> None:
    wide = load_tokenizer(folder / "tok.model", pause_id=65536)
    prepare([shards], wide, tmp_path / "wide", workers=1)
    assert CorpusManifest.load(tmp_path / "wide").dtype == "int32"
    assert IndexedDataset(str(tmp_path / "wide")).index.dtype == np.int32
    last = load_tokenizer(folder / "tok.model", pause_id=65535)
    prepare([shards], last, tmp_path / "last", workers=1)
    assert CorpusManifest.load(tmp_path / "last").dtype == "uint16"


def test_malformed_lines_are_counted_and_good_documents_unaffected(
    tmp_path: Path, reference, tokenizer: Tokenizer
) -> None:
    bad = [b"{", b"[1]", b'{"text": ""}', b'{"text": "\xff"}', b'{"text": 3}', b'{"no": 1}', b'{"text": "\\ud800"}']
    names = ["not-json", "not-object", "empty", "invalid-utf8", "text-not-string", "no-text", "lone-surrogate"]
    rng = random.Random(3)
    good = json_lines(TEXTS).splitlines()
    expected: dict[str, int] = dict.fromkeys(names, 0)
    shards: list[list[bytes]] = [[], []]
    first_bad = None
    for number, line in enumerate(good):
        shard = shards[number >= len(good) // 2]
        while rng.random() < 0.4:
            kind = rng.randrange(len(bad))
            shard.append(bad[kind])
            expected[names[kind]] += 1
            first_bad = first_bad or (names[kind], len(shard))
        shard.append(line)
    for number, lines in enumerate(shards):
        (tmp_path / f"{number}.jsonl").write_bytes(b"\n".join(lines))
    prepared = prepare([str(tmp_path / "?.jsonl")], tokenizer, tmp_path / "c", workers=1)
    assert (tmp_path / "c.bin").read_bytes() == reference[".bin"]
    counts = prepared.manifest.counts
    assert counts.malformed == {kind: count for kind, count in sorted(expected.items()) if count}
    kind, line = first_bad
    place = prepared.manifest.places[kind][0]
    assert (place.file, place.line) == (str(tmp_path / "0.jsonl"), line)
    assert f"malformed lines left out: {counts.malformed_total}" in summary(prepared, tmp_path / "c")
    for limit in (counts.malformed_total - 1, 0, 0.01):
        with pytest.raises(DataError, match=rf"more than --max-malformed {limit} allows:\n  \S+: .*\.jsonl:\d+"):
            prepare([str(tmp_path / "?.jsonl")], tokenizer, tmp_path / "d", workers=1, max_malformed=limit)
        assert not any(name in _files(tmp_path / "d") for name in (".bin", ".idx", ".manifest.json"))
    prepare([str(tmp_path / "?.jsonl")], tokenizer, tmp_path / "d", max_malformed=counts.malformed_total)
    assert (tmp_path / "d.bin").read_bytes() == reference[".bin"]


def test_bad_input(tmp_path: Path, shards: str, tokenizer: Tokenizer) -> None:
    for content, message in [
        (b"\n\n", "expected documents, got none .*blank-line: 2"),
        (b'{"a": 1}\n', "no-text: 1"),
    ]:
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=f"(?s){message}"):
            prepare([str(tmp_path / "x.jsonl")], tokenizer, tmp_path / "c", workers=1)
        assert not _files(tmp_path / "c")
    whole = Path(shards.replace("*", "00000-of-00006")).read_bytes()
    (tmp_path / "t.json.gz").write_bytes(whole[: len(whole) // 2])
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"t\.json\.gz: truncated: .* readable up to line [\d,]+"):
            prepare([shards, str(tmp_path / "t.json.gz")], tokenizer, tmp_path / "t", workers=workers)
        assert not (tmp_path / "t.bin").exists()
    prepared = prepare(
        [str(tmp_path / "t.json.gz")], tokenizer, tmp_path / "k", options=ReadOptions(damaged_shards="keep")
    )
    assert prepared.manifest.counts.malformed == {"damaged-shard": 1}
    assert _read(tmp_path / "k")[0] == [*tokenizer.encode(TEXTS[0]), tokenizer.eod]
    for settings, message in [
        ({"workers": 0}, "--workers: .*got 0"),
        ({"max_malformed": -1}, "--max-malformed: .*got -1"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare([shards], tokenizer, tmp_path / "c", **settings)


def test_a_wrong_text_key_can_be_corrected_without_overwrite(tmp_path: Path, shards: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no-text"):
        prepare([shards], tokenizer, tmp_path / "c", workers=1, options=ReadOptions(text_key="body"))
    prepare([shards], tokenizer, tmp_path / "c", workers=1)


def test_a_second_run_does_nothing_and_another_spec_is_an_error(
    tmp_path: Path, shards: str, tokenizer: Tokenizer, reference
) -> None:
    prepare([shards], tokenizer, tmp_path / "c", workers=1)
    for path in sorted(Path(shards).parent.iterdir()):
        os.utime(path)  # as a second download would
    again = prepare([shards], tokenizer, tmp_path / "c")
    assert again.already_done
    assert "already prepared" in summary(again, tmp_path / "c")
    other = load_tokenizer(train_model(tmp_path / "other.model", vocab_size=500))
    with pytest.raises(DataError, match=r"(?s)The differences:.*tokenizer fingerprint: .* there, .* now"):
        prepare([shards], other, tmp_path / "c")
    with pytest.raises(DataError, match="text_key: text there, url now"):
        prepare([shards], tokenizer, tmp_path / "c", options=ReadOptions(text_key="url"))
    with pytest.raises(DataError, match="sources: 6 there, 1 now"):
        prepare([shards.replace("*", "00000*")], tokenizer, tmp_path / "c")
    copied = shutil.copytree(Path(shards).parent, tmp_path / "copied")
    with pytest.raises(DataError, match=r"of other sources(?s:.)*1: \(/.*, [\d,]+ bytes\) there, \(/.*\) now"):
        prepare([f"{copied}/*"], tokenizer, tmp_path / "c")
    assert _files(tmp_path / "c") == {**reference, ".manifest.json": _files(tmp_path / "c")[".manifest.json"]}
    prepare([shards], other, tmp_path / "c", workers=1, overwrite=True)
    assert open_corpus(tmp_path / "c").tokenizer.fingerprint == other.fingerprint


def test_changed_sources_and_foreign_files_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shard = tmp_path / "x.jsonl"
    shard.write_bytes(json_lines(["one two"]))
    prepare([str(shard)], tokenizer, tmp_path / "c", workers=1)
    shard.write_bytes(json_lines(["two one"]))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(DataError, match=r"c: .*x\.jsonl has changed since the corpus was prepared"):
        prepare([str(shard)], tokenizer, tmp_path / "c")
    (tmp_path / "f.bin").write_bytes(b"theirs")
    with pytest.raises(DataError, match=r"f\.bin: expected .*, got a file without a manifest"):
        prepare([str(shard)], tokenizer, tmp_path / "f")
    assert (tmp_path / "f.bin").read_bytes() == b"theirs"


def test_progress_adds_up(tmp_path: Path, shards: str, tokenizer: Tokenizer) -> None:
    seen: list[PrepareProgress] = []
    prepared = prepare([shards], tokenizer, tmp_path / "c", workers=1, on_progress=seen.append)
    read = [progress for progress in seen if progress.phase == "read"][-1]
    counts = prepared.manifest.counts
    assert (read.documents, read.tokens, read.text_bytes) == (counts.documents, counts.tokens, counts.text_bytes)
    assert read.done_bytes == read.total_bytes
    assert seen[-1].phase == "join" and seen[-1].done_bytes == seen[-1].total_bytes


# Killed, or out of disk, at every file operation ---------------------------------------------------------------------

_armed: dict[str, object] = {}


def _on_file_operation(event: str, arguments: tuple) -> None:
    """Counts operations that change files under a folder, and lets a fault happen at the chosen one."""
    if not _armed:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if not writes and event not in _armed["events"]:
        return
    if not str(arguments[0]).startswith(_armed["folder"]):
        return
    _armed["left"] -= 1
    if _armed["left"] == 0:
        _armed["fault"]()


sys.addaudithook(_on_file_operation)


def _in_child(body) -> int:
    """Runs a function in a forked process and returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_killed_at_every_file_operation_and_started_again(
    tmp_path: Path, shards: str, tokenizer: Tokenizer, reference
) -> None:
    few = [shards.replace("*", name) for name in ("00000-of-00006", "00001-of-00006")]
    prepare(few, tokenizer, tmp_path / "whole", workers=1)
    expected = _files(tmp_path / "whole")
    for operation in range(1, 200):
        place = tmp_path / str(operation)
        place.mkdir()

        def body(place=place, operation=operation) -> None:
            events = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
            fault = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            _armed.update(folder=str(place), left=operation, events=events, fault=fault)
            prepare(few, tokenizer, place / "c", workers=1, encoder="library")

        status = _in_child(body)
        if (place / "c.manifest.json").exists():
            verify_corpus(open_corpus(place / "c"))
        kept = {path.name: path.stat().st_mtime_ns for path in place.glob("c.parts/0*.json")}
        prepared = prepare(few, tokenizer, place / "c", workers=1, encoder="library")
        assert prepared.parts_reused == (len(kept) if not prepared.already_done else 0)
        assert _files(place / "c") == expected
        assert not list(place.glob("c.parts")) and not list(place.rglob("*.tmp"))
        if status == 0:
            assert operation > 20
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
    pytest.fail("the preparation never came to its end")


def test_disk_full_at_every_file_operation(tmp_path: Path, shards: str, tokenizer: Tokenizer) -> None:
    few = [shards.replace("*", name) for name in ("00000-of-00006", "00001-of-00006")]
    prepare(few, tokenizer, tmp_path / "whole", workers=1)
    expected = _files(tmp_path / "whole")

    def fault() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for operation in range(1, 200):
        place = tmp_path / str(operation)
        place.mkdir()
        _armed.update(folder=str(place), left=operation, events=("os.rename", "os.mkdir"), fault=fault)
        try:
            prepare(few, tokenizer, place / "c", workers=1, encoder="library")
            if _armed["left"] > 0:
                assert operation > 15
                return
        except DataError as error:
            assert "No space left on device; finished shards are kept" in str(error)
            assert not (place / "c.manifest.json").exists()
        finally:
            _armed.clear()
        assert not list(place.rglob("*.tmp"))
        kept = list(place.glob("c.parts/0*.json"))
        prepared = prepare(few, tokenizer, place / "c", workers=1, encoder="library")
        assert prepared.parts_reused == (len(kept) if not prepared.already_done else 0)
        assert _files(place / "c") == expected
    pytest.fail("the preparation never came to its end")


def _assert_whole(prefix: Path, reference: dict[str, bytes]) -> None:
    """Complete, and with the reference's bytes; its manifest says the times of the sources, which tests change."""
    verify_corpus(open_corpus(prefix))
    found = _files(prefix)
    assert found.keys() == reference.keys()
    assert (found[".bin"], found[".idx"]) == (reference[".bin"], reference[".idx"])


def _stop_while_joining(shards: str, tokenizer: Tokenizer, output: Path, parts: int) -> None:
    """Leaves so many of the six parts in joined.bin, and none of those in a file of its own."""

    def stop(progress: PrepareProgress) -> None:
        if progress.phase == "join" and progress.shards_done == parts:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([shards], tokenizer, output, workers=1, on_progress=stop)
    assert sorted(path.name for path in Path(f"{output}.parts").glob("0*.bin")) == [
        f"{number:05d}.bin" for number in range(parts, 6)
    ]


def test_joining_needs_room_for_one_more_part(tmp_path: Path, shards: str, reference, tokenizer: Tokenizer) -> None:
    room: list[int] = []

    def measure(progress: PrepareProgress) -> None:
        if progress.phase == "join":
            room.append(sum(path.stat().st_size for path in tmp_path.rglob("*.bin*")))

    prepare([shards], tokenizer, tmp_path / "c", workers=1, on_progress=measure)
    largest = max(record.counts.tokens for record in CorpusManifest.load(tmp_path / "c").sources) * 2
    assert len(reference[".bin"]) < max(room) <= len(reference[".bin"]) + largest
    _assert_whole(tmp_path / "c", reference)


def test_joining_resumes_and_redoes_only_what_was_lost(
    tmp_path: Path, shards: str, reference, tokenizer: Tokenizer
) -> None:
    output, joined = tmp_path / "c", tmp_path / "c.parts" / "joined.bin"
    _stop_while_joining(shards, tokenizer, output, 2)
    _stop_while_joining(shards, tokenizer, output, 3)
    assert prepare([shards], tokenizer, output, workers=1).parts_reused == 6
    _assert_whole(output, reference)

    for parts, lose, reused in [
        (3, lambda: os.truncate(joined, joined.stat().st_size - 1), 3),
        # Part 1 was lost, and with it part 2, which has no file of its own.
        (3, lambda: (tmp_path / "c.parts" / "00001.json").unlink(), 4),
        (6, lambda: joined.unlink(), 0),
        (6, lambda: joined.rename(f"{output}.bin"), 6),  # killed between the names and the manifest
    ]:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        _stop_while_joining(shards, tokenizer, output, parts)
        lose()
        assert prepare([shards], tokenizer, output, workers=1).parts_reused == reused
        _assert_whole(output, reference)


def test_a_joined_part_that_the_disk_alters_is_redone(
    tmp_path: Path, shards: str, reference, tokenizer: Tokenizer
) -> None:
    _stop_while_joining(shards, tokenizer, tmp_path / "c", 3)
    joined = tmp_path / "c.parts" / "joined.bin"
    content = bytearray(joined.read_bytes())
    content[-1] ^= 1  # in part 2
    joined.write_bytes(content)
    with pytest.raises(
        DataError, match=r"joined\.bin: expected digest .*: altered on disk .* run the same command again"
    ):
        prepare([shards], tokenizer, tmp_path / "c", workers=1)
    assert prepare([shards], tokenizer, tmp_path / "c", workers=1).parts_reused == 5
    _assert_whole(tmp_path / "c", reference)


def test_an_old_corpus_is_not_mistaken_for_joined_parts(
    tmp_path: Path, shards: str, reference, tokenizer: Tokenizer
) -> None:
    """--overwrite stopped while it joins, and its joined.bin lost: the corpus that it would replace stays whole."""
    prepare([shards], tokenizer, tmp_path / "c", workers=1)

    def stop(progress: PrepareProgress) -> None:
        if progress.phase == "join" and progress.shards_done == 6:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare([shards], tokenizer, tmp_path / "c", workers=1, overwrite=True, on_progress=stop)
        verify_corpus(open_corpus(tmp_path / "c"))
        (tmp_path / "c.parts" / "joined.bin").unlink()
    prepare([shards], tokenizer, tmp_path / "c", workers=1, overwrite=True)
    _assert_whole(tmp_path / "c", reference)


@pytest.mark.parametrize("limit", [100, 3000, 20_000])
def test_a_write_that_fails_in_the_middle(tmp_path: Path, shards: str, tokenizer: Tokenizer, limit: int) -> None:
    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            prepare([shards], tokenizer, tmp_path / "c", workers=1)
        except DataError as error:
            os._exit(7 if "File too large; finished shards are kept" in str(error) else 8)

    assert os.waitstatus_to_exitcode(_in_child(body)) == 7
    assert not list(tmp_path.glob("c.[bim]*"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_at_random_moments_with_several_workers(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, full: bool
) -> None:
    shards = write_shards(tmp_path / "s", TEXTS * 20, 8)
    prepare([shards], tokenizer, tmp_path / "whole", workers=1)
    command = [sys.executable, "-m", "pause_megatron", "prepare", "--input", shards, "--workers", "3"]
    command += ["--tokenizer", str(folder / "tok.model"), "--output", str(tmp_path / "c"), "--encoder"]
    rng = random.Random(1)
    finished: dict[str, int] = {}
    completed = 0
    for number in range(100 if full else 4):
        encoder = rng.choice(["library", "gigatoken" if _has_gigatoken() else "library"])  # the bytes are the same
        process = subprocess.Popen(
            [*command, encoder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        if number % 4 == 3:  # in the middle of joining the parts, which is short
            _wait(process, (tmp_path / "c.parts" / "joined.bin").exists, pause=0.0005)
            time.sleep(rng.uniform(0, 0.01))
        else:
            wanted = time.monotonic() + rng.uniform(0.3, 3.0)
            _wait(process, lambda wanted=wanted: time.monotonic() >= wanted, pause=0.01)
        kill = os.killpg if rng.random() < 0.5 else os.kill  # the whole job, or its first process alone
        if process.poll() is None:
            kill(process.pid, signal.SIGKILL)
        process.communicate()
        if (tmp_path / "c.manifest.json").exists():  # complete; the parts may be in the middle of being removed
            for name in ("bin", "idx", "manifest.json"):
                assert (tmp_path / f"c.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()
            completed += 1
            if full:  # begin anew: most moments lie before the end
                for path in tmp_path.glob("c.*"):
                    path.unlink() if path.is_file() else shutil.rmtree(path)
            finished = {}
            continue
        now = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("c.parts/0*.json")}
        assert finished.items() <= now.items()  # no finished shard was done again
        finished = now
    print(f"{completed} of the preparations came to their end before they were killed")
    result = subprocess.run([*command, "auto"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    words = ("documents/s", "already prepared", "finished shards were kept")
    assert any(word in result.stdout + result.stderr for word in words)
    assert _files(tmp_path / "c") == _files(tmp_path / "whole")


def _has_gigatoken() -> bool:
    return importlib.util.find_spec("gigatoken") is not None


def _wait(process: subprocess.Popen, until: Callable[[], bool], pause: float) -> None:
    while process.poll() is None and not until():
        time.sleep(pause)


def test_a_killed_worker_is_an_error_that_keeps_finished_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import multiprocessing

    shards = write_shards(tmp_path / "s", TEXTS * 100, 4)

    others = {process.pid for process in multiprocessing.active_children()}  # the rank pools of other tests
    killed = []

    def kill_one(progress: PrepareProgress) -> None:
        if progress.documents and not killed:
            killed.append(next(p.pid for p in multiprocessing.active_children() if p.pid not in others))
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(DataError, match="a worker process was killed"):
        prepare([shards], tokenizer, tmp_path / "c", workers=2, on_progress=kill_one)
    assert not (tmp_path / "c.bin").exists()


def test_two_preparations_of_one_corpus_refuse_each_other(tmp_path: Path, shards: str, tokenizer: Tokenizer) -> None:
    messages = []

    def second(progress: PrepareProgress) -> None:
        if not messages:
            try:
                prepare([shards], tokenizer, tmp_path / "c", workers=1)
            except DataError as error:
                messages.append(str(error))

    prepare([shards], tokenizer, tmp_path / "c", workers=1, on_progress=second)
    assert messages and "another process is working on corpus" in messages[0]
    verify_corpus(open_corpus(tmp_path / "c"))


def test_the_verbs_end_to_end(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pause_megatron", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    write_shards(tmp_path / "shards", TEXTS, 3)
    trained = run("train-tokenizer", "--input", "shards/*.json.gz", "--vocab-size", "500", "--output", "tok.model")
    assert trained.returncode == 0, trained.stderr
    assert "500 pieces" in trained.stdout
    command = ["prepare", "--input", "shards/*.json.gz", "--tokenizer", "tok.model", "--output", "data/c4"]
    prepared = run(*command, "--workers", "2", "--verify")
    assert prepared.returncode == 0, prepared.stderr
    for words in ("documents/s", "MB/s", "tokens/s", "shard 3 of 3"):
        assert words in prepared.stderr
    assert "<pause> reserved as 500" in prepared.stdout and "verified" in prepared.stdout
    again = run(*command)
    assert (again.returncode, again.stdout.split("\n")[0]) == (0, "already prepared: nothing to do")
    for arguments in (["--pause-id", "2"], ["--input", "nothing/*"], ["--text-key", "body"]):
        refused = run(*command, *arguments)
        assert refused.returncode == 2
        assert "error:" in refused.stderr and "Traceback" not in refused.stderr
