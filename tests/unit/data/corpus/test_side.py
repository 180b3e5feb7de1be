"""Side arrays: what is recorded, and that a wrong, damaged, foreign or hostile file is refused by name."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.prose import documents, small_tokenizer, write_shards

from pause_megatron.cli import main
from pause_megatron.config.load import load
from pause_megatron.data.adopt.run import adopt
from pause_megatron.data.corpus.corpora import open_corpora
from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.side import distribution, find_side, header_of, open_side
from pause_megatron.data.corpus.side_writing import register_values
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.files.digest import bytes_digest


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora a and b of the same number of tokens, made of the same documents in another order."""
    folder = tmp_path_factory.mktemp("sides")
    tokenizer = small_tokenizer(folder)
    texts = documents(60)
    for name, order in (("a", texts), ("b", texts[::-1])):
        prepare([write_shards(folder / name, order, 1)], tokenizer, folder / name / "c", workers=1)
    return folder


@pytest.fixture
def corpus(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "a", tmp_path / "a")
    return tmp_path / "a" / "c"


def values_of(prefix: Path, dtype: str = "float16", seed: int = 0) -> np.ndarray:
    count = CorpusManifest.load(prefix).counts.tokens
    return (np.random.default_rng(seed).random(count) * 100).astype(dtype)


def register(prefix: Path, values: np.ndarray, name: str = "score", **options: bool) -> np.ndarray:
    file = prefix.with_name(f"own-{name}.npy")
    np.save(file, values)
    register_values(prefix, name, file, **options)
    return values


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int8", "uint16", "int64"])
def test_values_are_those_that_were_registered(corpus: Path, dtype: str) -> None:
    values = register(corpus, values_of(corpus, dtype))
    opened = open_side(str(corpus), "score")
    assert opened.dtype == dtype and isinstance(opened, np.memmap) and not opened.flags.writeable
    np.testing.assert_array_equal(opened, values)
    np.testing.assert_array_equal(np.load(f"{corpus}.score.npy", allow_pickle=False), values)  # numpy reads it too


def test_big_endian_values_keep_their_value(corpus: Path) -> None:
    values = values_of(corpus, "float32")
    register(corpus, values.astype(">f4"))
    np.testing.assert_array_equal(open_side(corpus, "score"), values)


def test_a_manifest_without_sides_keeps_its_bytes(corpus: Path) -> None:
    path = Path(f"{corpus}.manifest.json")
    before = path.read_bytes()
    manifest = CorpusManifest.load(corpus)
    assert "sides" not in json.loads(before) and manifest.version == 3
    register(corpus, values_of(corpus))
    scored = CorpusManifest.load(corpus)
    assert scored.version == 4 and scored.fingerprint == manifest.fingerprint
    assert scored.sides["score"].bin == manifest.files["bin"].digest
    scored.with_sides({}).save(corpus)
    assert path.read_bytes() == before


def test_side_arrays_of_a_manifest_of_the_first_version(corpus: Path) -> None:
    path = Path(f"{corpus}.manifest.json")
    content = json.loads(path.read_text())
    content["version"] = 1
    for absent in ("blocks", "digest", "adoption"):
        del content[absent]
    path.write_text(json.dumps(content))
    values = register(corpus, values_of(corpus))
    assert CorpusManifest.load(corpus).version == 4 and open_corpus(corpus).blocks == {}
    np.testing.assert_array_equal(open_side(corpus, "score"), values)


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _saved(path: Path, array: np.ndarray) -> None:
    np.save(path.open("wb"), array, allow_pickle=array.dtype == object)


class Payload:
    """An object that would create a file if it were unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return open, ("unpickled-by-the-test", "w")


HOSTILE: dict[str, Callable[[Path, np.ndarray], object]] = {
    "shorter": lambda path, values: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lambda path, values: path.write_bytes(path.read_bytes() + b"\0\0"),
    "empty": lambda path, values: path.write_bytes(b""),
    "missing": lambda path, values: path.unlink(),
    "a folder": lambda path, values: (path.unlink(), path.mkdir()),
    "another dtype": lambda path, values: _saved(path, values.view("uint16")),
    "two dimensions": lambda path, values: _saved(path, values.reshape(1, -1)),
    "objects": lambda path, values: _saved(path, np.array([Payload()], dtype=object)),
    "a pickle": lambda path, values: path.write_bytes(pickle.dumps(Payload())),
    "a flipped header": lambda path, values: _flip(path, 30),
    "a deep header": lambda path, values: path.write_bytes(
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 60_000).ljust(path.stat().st_size, b"(")[: path.stat().st_size]
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_wrong_file_is_refused_when_it_is_opened(corpus: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus.parent)
    path = Path(f"{corpus}.score.npy")
    HOSTILE[case](path, register(corpus, values_of(corpus)))
    with pytest.raises(DataError, match=r"c\.score\.npy: (expected|cannot be read)"):
        open_side(corpus, "score")
    assert not Path("unpickled-by-the-test").exists()


def test_a_file_of_another_corpus_of_the_same_length(original: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(original / "b", tmp_path / "b")
    other = tmp_path / "b" / "c"
    assert CorpusManifest.load(other).counts.tokens == CorpusManifest.load(corpus).counts.tokens
    register(corpus, values_of(corpus))
    register(other, values_of(other, seed=1))
    shutil.copy(f"{other}.score.npy", f"{corpus}.score.npy")
    config = load(overrides=[f"data.prefix={corpus}", "data.side=score", "pause.placement=scored"])
    with pytest.raises(DataError, match=r"c\.score\.npy is damaged; .*--values FILE\.npy --overwrite"):
        open_corpora(config.data, 1).verify(config.data)
    assert main(["verify", str(corpus)]) == 1
    # A record that was carried over to the manifest of another corpus.
    manifest = CorpusManifest.load(other)
    manifest.with_sides(CorpusManifest.load(corpus).sides).save(other)
    with pytest.raises(DataError, match=r"expected values for the \.bin of xxh3_128:\w+, got those of a corpus of"):
        open_side(other, "score")


@pytest.mark.parametrize("mode", ["once", "always", "never"])
def test_a_flipped_byte_is_found_at_the_first_use(corpus: Path, mode: str, capsys: pytest.CaptureFixture) -> None:
    register(corpus, values_of(corpus))
    register(corpus, values_of(corpus), "unused")
    config = load(
        overrides=[f"data.prefix={corpus}", "data.side=score", "pause.placement=scored", f"data.verify={mode}"]
    )
    open_corpora(config.data, 1).verify(config.data)
    _flip(Path(f"{corpus}.unused.npy"), 200)
    open_corpora(config.data, 1).verify(config.data)  # a side array that the run does not use
    _flip(Path(f"{corpus}.score.npy"), 200)
    if mode == "never":
        open_corpora(config.data, 1).verify(config.data)
    else:
        with pytest.raises(DataError, match=r"side array .*c\.score\.npy is damaged"):
            open_corpora(config.data, 1).verify(config.data)
    capsys.readouterr()
    assert main(["verify", str(corpus)]) == 1
    shown = capsys.readouterr().out
    assert f"whole    {corpus}:" in shown and shown.count("DAMAGED") == 2 and f"DAMAGED  {corpus}.score.npy" in shown


def test_the_fingerprint_of_a_run_has_the_values_that_it_uses(corpus: Path) -> None:
    def fingerprint(*overrides: str) -> str:
        return open_corpora(load(overrides=[f"data.prefix={corpus}", *overrides]).data, 1).fingerprint

    plain = fingerprint()
    register(corpus, values_of(corpus))
    assert fingerprint() == plain == CorpusManifest.load(corpus).fingerprint
    first = fingerprint("data.side=score", "pause.placement=scored")
    register(corpus, values_of(corpus, seed=1), overwrite=True)
    assert len({plain, first, fingerprint("data.side=score", "pause.placement=scored")}) == 3
    with pytest.raises(DataError, match=r"expected a side array of its manifest \(one of score\), got 'other'"):
        fingerprint("data.side=other", "pause.placement=scored")


def test_values_that_are_replaced_while_a_run_opens_them(corpus: Path) -> None:
    register(corpus, values_of(corpus))
    opened = open_corpora(
        load(overrides=[f"data.prefix={corpus}", "data.side=score", "pause.placement=scored"]).data, 1
    )
    opened.require_unchanged()
    register(corpus, values_of(corpus, seed=1), overwrite=True)
    with pytest.raises(DataError, match=r"c\.score\.npy: written again while this run was opening it"):
        opened.require_unchanged()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (lambda values: values[:-1], r"own\.npy: expected the shape \([\d,]+,\), one value for each token"),
        (lambda values: values.reshape(-1, 1), r"own\.npy: expected the shape"),
        (lambda values: values.astype("complex64"), r"expected values of float16, .*, got complex64"),
        (lambda values: values > 0, r"expected values of float16, .*, got bool"),
        (lambda values: np.full(len(values), Payload()), r"expected an array of numbers in numpy's format"),
        (lambda values: np.where(np.arange(len(values)) == 7, np.nan, values), r"token 7: expected a finite value"),
    ],
)
def test_values_that_cannot_be_registered(
    corpus: Path, tmp_path: Path, array: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    before = sorted(path.name for path in corpus.parent.iterdir())
    _saved(tmp_path / "own.npy", array(values_of(corpus)))
    with pytest.raises(DataError, match=message):
        register_values(corpus, "score", tmp_path / "own.npy")
    assert sorted(path.name for path in corpus.parent.iterdir()) == before


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 60_000, b"PK\x03\x04", b"no array"])
def test_files_that_are_no_array(corpus: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"own\.npy: expected an array of numbers in numpy's format"):
        register_values(corpus, "score", tmp_path / "own.npy")


def test_names(corpus: Path, tmp_path: Path) -> None:
    for name in ("", "a.b", "../a", "a/b", "-a", "parts", "BIN", "a" * 65, "é"):
        with pytest.raises(DataError, match=r"name of a side array: expected up to 64 letters"):
            register_values(corpus, name, tmp_path / "absent.npy")
        with pytest.raises(DataError, match=r"name of a side array: expected up to 64 letters"):
            find_side(corpus, name)


def test_a_side_array_is_replaced_only_on_request(corpus: Path) -> None:
    register(corpus, values_of(corpus))
    with pytest.raises(DataError, match=r"there is a side array 'score' already \(float16, values of the user's own\)"):
        register(corpus, values_of(corpus, seed=1))
    values = register(corpus, values_of(corpus, "uint8"), overwrite=True)
    np.testing.assert_array_equal(open_side(corpus, "score"), values)
    shutil.copy(f"{corpus}.score.npy", f"{corpus}.stray.npy")
    with pytest.raises(DataError, match=r"c\.stray\.npy: expected no such file, got one without a record"):
        register(corpus, values, "stray")
    with pytest.raises(DataError, match=r"got 'stray' \(.*stray\.npy is there, without a record in the manifest\)"):
        open_side(corpus, "stray")


def _register_one(prefix: str, number: int) -> None:
    register(Path(prefix), values_of(Path(prefix), seed=number), f"side{number}")


def test_concurrent_processes_do_not_lose_records(corpus: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_register_one, args=(str(corpus), number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert list(CorpusManifest.load(corpus).sides) == [f"side{number}" for number in range(6)]
    for number in range(6):
        np.testing.assert_array_equal(open_side(corpus, f"side{number}"), values_of(corpus, seed=number))
    assert not list(corpus.parent.glob("*.lock")) and not list(corpus.parent.glob("*.tmp"))


def test_a_corpus_that_is_prepared_again(original: Path, corpus: Path) -> None:
    tokenizer = load_tokenizer(original / "tok.model")
    values = register(corpus, values_of(corpus))
    prepare([str(original / "a" / "*.json.gz")], tokenizer, corpus, workers=1, overwrite=True)
    np.testing.assert_array_equal(open_side(corpus, "score"), values)  # the same files
    prepare([str(original / "b" / "*.json.gz")], tokenizer, corpus, workers=1, overwrite=True)
    assert CorpusManifest.load(corpus).sides == {} and not Path(f"{corpus}.score.npy").exists()


def test_a_corpus_that_is_adopted_again(original: Path, corpus: Path) -> None:
    values = register(corpus, values_of(corpus))
    adopt(corpus, load_tokenizer(original / "tok.model"), overwrite=True)
    manifest = CorpusManifest.load(corpus)
    assert manifest.adoption is not None and manifest.version == 4
    np.testing.assert_array_equal(open_side(corpus, "score"), values)


def test_a_kill_between_file_and_record_leaves_nothing_wrong(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(corpus, values_of(corpus))
    saves = []

    def save(self: CorpusManifest, prefix: Path) -> None:
        if saves:
            raise KeyboardInterrupt
        saves.append(original_save(self, prefix))

    original_save = CorpusManifest.save
    monkeypatch.setattr(CorpusManifest, "save", save)
    with pytest.raises(KeyboardInterrupt):
        register(corpus, values_of(corpus, seed=1), overwrite=True)
    monkeypatch.undo()
    with pytest.raises(DataError, match="without a record in the manifest"):
        open_side(corpus, "score")


def test_inspect_shows_the_distribution(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    register(corpus, np.arange(CorpusManifest.load(corpus).counts.tokens, dtype="int32"))
    last = len(open_side(corpus, "score")) - 1
    assert main(["inspect", str(corpus), "--windows", "2", "--json"]) == 0
    side = json.loads(capsys.readouterr().out)["sides"]["score"]
    assert (side["kind"], side["smallest"], side["median"], side["largest"]) == ("user", 0, last / 2, last)
    assert main(["verify", str(corpus)]) == 0
    assert f"{corpus}.score.npy: {last + 1:,} values (int32, values of the user's own)" in capsys.readouterr().out


def test_the_distribution_of_a_large_array_is_of_a_sample() -> None:
    found = distribution(np.arange(3_000_000, dtype=np.int32))
    assert (found.smallest, found.largest, found.values) == (0, 2_999_999, 1 << 20)
    assert found.median == pytest.approx(1_500_000, rel=0.01)


def test_the_header_is_that_of_numpy() -> None:
    for count in (0, 1, 10**12):
        for dtype in ("float16", "uint8"):
            header = header_of(dtype, count)
            assert len(header) % 64 == 0 and bytes_digest(header) == bytes_digest(header_of(dtype, count))
