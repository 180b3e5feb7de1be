"""The corpora of a run, opened together."""

from __future__ import annotations

from pathlib import Path

import pytest
from prose import documents, small_tokenizer, write_shards

from pause_megatron.cli import main
from pause_megatron.config.load import load
from pause_megatron.data.corpora import Corpora, open_corpora
from pause_megatron.data.prepare import prepare
from pause_megatron.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for name, texts in (("a", documents(40)), ("b", documents(60)[40:]), ("v", documents(80)[60:])):
        prepare([write_shards(folder / f"s{name}", texts, 1)], small_tokenizer(folder), folder / name, workers=1)
    return folder


def _open(folder: Path, *overrides: str) -> Corpora:
    return open_corpora(load(overrides=[override.format(folder) for override in overrides]).data, 1)


def test_the_fingerprint_is_of_what_trains(folder: Path) -> None:
    alone, with_valid = (
        _open(folder, "data.prefix={0}/a"),
        _open(folder, "data.prefix={0}/a", "data.valid_prefix={0}/v"),
    )
    assert [corpus.prefix for corpus in with_valid.valid] == [f"{folder}/v"]
    assert alone.fingerprint == with_valid.fingerprint
    blends = {_open(folder, f"data.prefix={blend}").fingerprint for blend in ("1 {0}/a 2 {0}/b", "1 {0}/a 3 {0}/b")}
    assert len(blends | {alone.fingerprint}) == 3


def test_a_corpus_that_trains_cannot_be_held_out(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.valid_prefix: .*/b holds the same documents as .*/b in data\.prefix"):
        _open(folder, "data.prefix=1 {0}/a 1 {0}/b", "data.valid_prefix={0}/v {0}/b")


def test_every_corpus_is_verified_at_its_first_use(folder: Path) -> None:
    overrides = ("data.prefix={0}/a", "data.valid_prefix={0}/v", "data.cache={0}/cache")
    data = load(overrides=[override.format(folder) for override in overrides]).data
    open_corpora(data, 1).verify(data)
    assert sorted(path.name[:2] for path in (folder / "cache").glob("*.verified")) == ["a.", "v."]
    before = data.model_copy(update={"cache": f"{folder}/before"})
    assert main(["verify", f"{folder}/a", f"{folder}/v", "--cache", before.cache]) == 0
    open_corpora(before, 1).verify(before)
    assert {path.suffix for path in (folder / "before").iterdir()} == {".verified"}  # no lock: nothing was read
    content = bytearray(Path(f"{folder}/v.bin").read_bytes())
    content[100] ^= 1
    Path(f"{folder}/v.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"v\.bin: bytes 0 to"):
        open_corpora(data, 1).verify(data)
