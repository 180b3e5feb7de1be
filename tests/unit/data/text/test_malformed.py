"""Ten thousand malformed lines among as many good ones: nothing good lost or changed, nothing bad left unnamed."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from pathlib import Path

import pytest
from support.malformed import BAD_LINES, DAMAGED_SHARDS, DRESSES, damaged_shards, long_line, mixed_lines
from support.prose import compress, documents, json_lines, small_tokenizer

from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.text.documents import KINDS, PLACES_KEPT, parse_line
from pause_megatron.data.text.malformed_limit import MalformedLimit
from pause_megatron.data.text.shard_file import MAX_LINE_BYTES, ShardFile
from pause_megatron.data.text.sources import ReadOptions
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.errors import DataError

KEEP = ReadOptions(damaged_shards="keep")
SUFFIXES = (".jsonl", ".json.gz", ".jsonl.zst")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("malformed"))


def _texts(count: int, rng: random.Random) -> list[str]:
    """Real sentences, some with characters that are rare in them."""
    sentences = [part.strip() for text in documents(400) for part in text.split(".") if len(part) > 20]
    odd = ["\0", "\u2028", "\ufffe", "\U0001f600", "\u00e9", '"text"', "\\", "[[[{{{", "<pause>", "\r"]
    return [rng.choice(sentences) + (rng.choice(odd) if rng.random() < 0.2 else "") for _ in range(count)]


def _write_mixed(folder: Path, clean: Path, size: int, seed: int) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """`size` good and `size` bad lines in shards of every compression, and damaged shards.

    Returns:
        (places of each kind, in order; the good texts)
    """
    rng = random.Random(seed)
    texts = _texts(size, rng)
    lines = mixed_lines(texts, size, rng)
    cuts = sorted(rng.randrange(len(lines)) for _ in range(7))
    expected: dict[str, list[tuple[str, int]]] = {}
    folder.mkdir()
    for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(lines)], strict=True)):
        path = folder / f"{number:02d}{SUFFIXES[number % 3]}"
        shard = lines[start:stop]
        if path.suffix == ".gz":  # members that were joined, one for some lines each
            blocks = [shard[at : at + 50] for at in range(0, len(shard), 50)] or [[]]
            content = b"".join(gzip.compress(b"".join(line + b"\n" for line, _ in block), 1) for block in blocks)
        else:
            content = compress(b"".join(line + b"\n" for line, _ in shard), path.suffix)
        path.write_bytes(content)
        for line, (_, kind) in enumerate(shard, start=1):
            if kind:
                expected.setdefault(kind, []).append((str(path), line))
    (folder / "60-nothing.jsonl").touch()
    long_line(folder / "61-long.jsonl.gz", 100)
    expected["too-long"] = [(str(folder / "61-long.jsonl.gz"), 1)]
    extra = _texts(3, rng)
    damaged_shards(folder, [rng.choice(DRESSES)(text) for text in extra])
    expected["damaged-shard"] = [
        (str(path), 2 if path.name[:2] in ("90", "91", "98") else 1) for path in sorted(folder.glob("9*"))
    ]
    assert len(expected["damaged-shard"]) == DAMAGED_SHARDS
    good = [*texts, "after it", *extra]
    clean.mkdir()
    (clean / "x.jsonl").write_bytes(json_lines(good))
    return expected, good


def test_malformed_lines_among_as_many_good_ones(
    tmp_path: Path, tokenizer: Tokenizer, full: bool, capsys: pytest.CaptureFixture
) -> None:
    size, seeds = (10_000, range(5)) if full else (1_000, range(1))
    for seed in seeds:
        place = tmp_path / str(seed)
        place.mkdir()
        expected, good = _write_mixed(place / "mixed", place / "clean", size, seed)
        total = sum(map(len, expected.values()))
        arguments = {"workers": 1, "options": KEEP}
        prepare([f"{place}/mixed/*"], tokenizer, place / "m", max_malformed=total, **arguments)
        prepare([f"{place}/clean/x.jsonl"], tokenizer, place / "c", workers=1)
        for name in ("bin", "idx"):
            assert Path(f"{place}/m.{name}").read_bytes() == Path(f"{place}/c.{name}").read_bytes()
        manifest = CorpusManifest.load(place / "m")
        assert manifest.counts.documents == len(good)
        assert manifest.counts.malformed == {kind: len(places) for kind, places in sorted(expected.items())}
        assert set(expected) == set(KINDS)
        for kind, places in manifest.places.items():
            assert [(found.file, found.line) for found in places] == expected[kind][:PLACES_KEPT]
        assert sum(record.counts.malformed_total for record in manifest.sources) == total
        assert prepare([f"{place}/mixed/*"], tokenizer, place / "m", **arguments).already_done
        for limit in (total - 1, 100, 0.3):
            with pytest.raises(DataError, match=rf"more than --max-malformed {limit} allows:\n  \S+: .*/mixed/\d+"):
                prepare([f"{place}/mixed/*"], tokenizer, place / "l", max_malformed=limit, **arguments)
            left = {path.name for path in place.iterdir()} - {"mixed", "clean"}
            assert {name for name in left if name.startswith("l.")} <= {"l.parts"}
            assert not list(place.rglob("*.tmp"))
        prepare([f"{place}/mixed/*"], tokenizer, place / "l", max_malformed=0.6, **arguments)
        assert Path(f"{place}/l.bin").read_bytes() == Path(f"{place}/c.bin").read_bytes()
        if full:
            with capsys.disabled():
                print(f"\nseed {seed}: {len(good):,} good documents bit-identical; {manifest.counts.malformed}", end="")


def test_there_are_enough_kinds() -> None:
    assert len(BAD_LINES) + DAMAGED_SHARDS + 1 >= 50
    assert {kind for _, kind in BAD_LINES} == set(KINDS) - {"too-long", "damaged-shard"}


@pytest.mark.parametrize("number", range(DAMAGED_SHARDS))
def test_damaged_shards_stop_a_run_unless_kept(tmp_path: Path, tokenizer: Tokenizer, number: int) -> None:
    damaged_shards(tmp_path, [DRESSES[0](text) for text in ("one", "two", "three")])
    path = sorted(tmp_path.glob("9*"))[number]
    (tmp_path / "a.jsonl").write_bytes(json_lines(["good"]))
    inputs = [str(tmp_path / "a.jsonl"), f"{tmp_path}/{path.name[:4]}*"]
    with pytest.raises(DataError, match=rf"{path.name}: "):
        prepare(inputs, tokenizer, tmp_path / "c", workers=1)
    assert not [name for name in tmp_path.glob("c.*") if name.name != "c.parts"]
    kept = prepare(inputs, tokenizer, tmp_path / "k", workers=1, options=KEEP).manifest
    assert kept.counts.malformed == {"damaged-shard": 1}
    assert kept.counts.documents == 1 + (path.name[:2] in ("90", "91", "98"))


def test_other_folders_in_a_glob_are_passed_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "s" / "folder").mkdir(parents=True)
    (tmp_path / "s" / "a.jsonl").write_bytes(json_lines(["good"]))
    assert prepare([f"{tmp_path}/s/*"], tokenizer, tmp_path / "c", workers=1).manifest.counts.documents == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_is_bounded_for_a_line_of_100_megabytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".json.gz":
        long_line(path, 100)
    else:
        path.write_bytes(compress(b'{"text": "' + b"a" * 100_000_000 + b'"}\n{"text": "after it"}\n', suffix))
    tracemalloc.start()
    try:
        assert list(ShardFile(path).lines()) == [None, b'{"text": "after it"}']
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_LINE_BYTES + (36 << 20)


@pytest.mark.parametrize("depth", [199, 200, 201, 900])
def test_nesting_is_judged_the_same_at_any_depth_of_the_stack(depth: int) -> None:
    line = b'{"text": "x", "tree": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    def deeper(levels: int) -> object:
        return parse_line(line, 1, "text") if levels == 0 else deeper(levels - 1)

    found = {str(deeper(levels)) for levels in (0, 300, 600)}
    assert len(found) == 1 and (found == {"x"}) == (depth <= 200)


# The limit ------------------------------------------------------------------------------------------------------------


def test_a_number_is_judged_at_once_and_a_fraction_when_it_cannot_be_met() -> None:
    number, fraction = MalformedLimit(10), MalformedLimit(0.01)
    assert not number.should_abort(10, 0, 1, 100) and number.should_abort(11, 0, 1, None)
    # 1,000,000 lines to come: 10,000 may be malformed, and twice as many end the run
    assert not fraction.should_abort(9_999, 0, 1, 100)
    assert not fraction.should_abort(20_000, 80_000, 10, 100)
    assert fraction.should_abort(20_001, 79_999, 10, 100)
    assert not fraction.should_abort(100_000, 0, 10, None)
    assert not fraction.exceeded(10, 990) and fraction.exceeded(11, 989)


def test_a_fraction_out_of_reach_stops_before_the_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_bytes(b"[]\n" * 100_000 + json_lines(["good"]))
    with pytest.raises(DataError, match=r"stopped after [\d,]+ malformed lines, more than --max-malformed 0\.001"):
        prepare([f"{tmp_path}/?.jsonl"], tokenizer, tmp_path / "c", workers=1, max_malformed=0.001)
    assert not [path for path in tmp_path.glob("c.*") if path.name != "c.parts"]
