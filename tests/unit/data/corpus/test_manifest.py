"""Opening a corpus: truncated, mixed up or foreign files and another tokenizer are errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.prose import documents, small_tokenizer, train_model, write_shards

from pause_megatron.data.corpus.corpus import open_corpus, require_one_tokenizer
from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.verify import verify_corpus
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import DataError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    tokenizer = small_tokenizer(folder)
    for name, count in (("a", 40), ("b", 50)):
        prepare([write_shards(folder / name, documents(count), 2)], tokenizer, folder / name / "c", workers=1)
    return folder


@pytest.fixture
def corpus(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original / "a", tmp_path / "a")
    return tmp_path / "a" / "c"


def test_manifest_comes_back(corpus: Path) -> None:
    manifest = CorpusManifest.load(corpus)
    manifest.save(corpus)
    assert CorpusManifest.load(corpus) == manifest


def test_opening_returns_the_tokenizer_and_accepts_the_right_one(corpus: Path, original: Path) -> None:
    opened = open_corpus(corpus, original / "tok.model")
    assert opened.tokenizer.pause_id == opened.manifest.tokenizer.pause_id == 600
    verify_corpus(opened)


def test_wrong_tokenizer(corpus: Path, tmp_path: Path) -> None:
    other = train_model(tmp_path / "other.model", vocab_size=500)
    with pytest.raises(
        DataError, match=r"expected its tokenizer sentencepiece:\w+ \(600 ids\), got sentencepiece:\w+ \(500 ids\)"
    ):
        open_corpus(corpus, other)
    load_tokenizer(other).save(f"{corpus}.tokenizer")
    with pytest.raises(DataError, match="tokenizer: expected the corpus's tokenizer kind='sentencepiece'"):
        open_corpus(corpus)


def test_every_shorter_bin_and_idx_is_refused(corpus: Path) -> None:
    for name, message in (
        ("bin", r"c\.bin: expected [\d,]+ bytes, the size in c\.idx, got "),
        ("idx", r"c\.idx: (expected a Megatron index|.*truncated)"),
    ):
        path = Path(f"{corpus}.{name}")
        whole = path.read_bytes()
        for length in {0, 1, 33, 34, 35, len(whole) // 2, len(whole) - 2, len(whole) - 1}:
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match=message):
                open_corpus(corpus)
        path.write_bytes(whole)
    open_corpus(corpus)


def test_longer_missing_and_swapped_files(corpus: Path, original: Path) -> None:
    with open(f"{corpus}.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(DataError, match=r"c\.bin: expected [\d,]+ bytes, the size in c\.idx, got "):
        open_corpus(corpus)
    for name in ("bin", "idx"):
        shutil.copy(original / "b" / f"c.{name}", f"{corpus}.{name}")
    with pytest.raises(DataError, match="the files are of different corpora"):
        open_corpus(corpus)
    Path(f"{corpus}.bin").unlink()
    with pytest.raises(DataError, match=r"c\.bin: expected the \.bin of .*, got no such file"):
        open_corpus(corpus)


def test_a_flipped_bit_is_found_by_verify(corpus: Path) -> None:
    for name in ("bin", "idx"):
        path = Path(f"{corpus}.{name}")
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)
        with pytest.raises(DataError, match=rf"c\.{name}: bytes 0 to [\d,]+: altered since"):
            verify_corpus(open_corpus(corpus))
        whole[len(whole) // 2] ^= 1
        path.write_bytes(whole)


def test_no_manifest(corpus: Path, tmp_path: Path) -> None:
    Path(f"{corpus}.manifest.json").unlink()
    expected = "without a manifest: it was not made by `pause-megatron prepare`, or its preparation did not finish"
    with pytest.raises(DataError, match=expected):
        open_corpus(corpus)
    Path(f"{corpus}.parts").mkdir()
    with pytest.raises(DataError, match=r"got an unfinished preparation; run the same `prepare` command again"):
        open_corpus(corpus)
    with pytest.raises(DataError, match="no corpus at"):
        open_corpus(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "manifest.json: the file: Invalid JSON"),
        ("[]", "manifest.json: the file: Input should be"),
        ("{}", "manifest.json: tokenizer: Field required"),
    ],
)
def test_damaged_manifest(corpus: Path, content: str, message: str) -> None:
    Path(f"{corpus}.manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        open_corpus(corpus)


def test_manifest_of_another_version(corpus: Path) -> None:
    path = Path(f"{corpus}.manifest.json")
    path.write_text(path.read_text().replace('"version": 3', '"version": 5'))
    with pytest.raises(DataError, match=r"manifest\.json: version: Input should be 1, 2, 3 or 4 \(got '5'\)"):
        open_corpus(corpus)


def test_a_blend_needs_one_tokenizer(original: Path, tmp_path: Path) -> None:
    first, second = open_corpus(original / "a" / "c"), open_corpus(original / "b" / "c")
    assert require_one_tokenizer([first, second]) is first.tokenizer
    assert first.manifest.fingerprint != second.manifest.fingerprint
    moved = load_tokenizer(original / "tok.model", pause_id=700)
    prepare([str(original / "a" / "*.json.gz")], moved, tmp_path / "m", workers=1)
    with pytest.raises(DataError, match=r"cannot be blended: expected .*pause_id=600.* got .*pause_id=700"):
        require_one_tokenizer([first, open_corpus(tmp_path / "m")])
