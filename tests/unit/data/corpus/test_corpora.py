"""The corpora of a run, opened together."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.prose import documents, small_tokenizer, write_shards

from pause_megatron.cli import main
from pause_megatron.config.load import dump, load
from pause_megatron.data.corpus.corpora import Corpora, open_corpora
from pause_megatron.data.prepare.run import prepare
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
    with pytest.raises(
        DataError,
        match=r"data\.valid_prefix: expected .*, got .*/b, which has the same documents as .*/b in data\.prefix",
    ):
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


def test_a_blank_in_the_path_of_a_corpus(folder: Path, tmp_path: Path) -> None:
    """In a list it works everywhere; as text, the message shows the list, and that list works."""
    for name in ("a", "v"):
        for path in folder.glob(f"{name}.*"):
            target = tmp_path / "my data" / path.name.replace(f"{name}.", f"{name} corpus.")
            (shutil.copytree if path.is_dir() else _copy)(path, target)
    mine, held_out = f"{tmp_path}/my data/a corpus", f"{tmp_path}/my data/v corpus"
    for given, meant in (
        (mine, [mine]),
        (f"3 {mine} 1 {folder}/b", ["3", mine, "1", f"{folder}/b"]),
        (f"{folder}/b {mine}", [f"{folder}/b", mine]),
    ):
        with pytest.raises(
            DataError, match=r"data\.prefix: no corpus at .*/my: expected .*/my\.manifest\.json"
        ) as caught:
            open_corpora(load(overrides=[f"data.prefix={given}"]).data, 1)
        assert f". There is one at {mine!r}. Blanks separate prefixes" in str(caught.value)
        (advice,) = re.findall(r"on a command line: (data\.prefix=.*)$", str(caught.value))
        (word,) = shlex.split(advice)
        config = load(overrides=[word, f"data.valid_prefix={json.dumps([held_out])}"])
        assert list(config.data.prefix) == meant
        opened = open_corpora(config.data, 1)
        assert [corpus.prefix for corpus in opened.corpora] == [each for each in meant if not each.isdigit()]
        assert [corpus.prefix for corpus in opened.valid] == [held_out]
        (tmp_path / "config.yaml").write_text(dump(config))
        assert load(tmp_path / "config.yaml") == config
    with pytest.raises(DataError, match=r"data\.valid_prefix: no corpus at x: .* of `prepare`\. Blanks separate"):
        open_corpora(load(overrides=[f"data.prefix={folder}/a", "data.valid_prefix=x y"]).data, 1)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copy(source, target)


def test_a_corpus_that_is_replaced_while_it_is_opened(folder: Path, tmp_path: Path) -> None:
    """What was opened and what is mapped must be the same corpus; the same one, written again, is."""
    tokenizer, prefix = small_tokenizer(folder), tmp_path / "c"

    def write(texts: list[str]) -> None:
        prepare([write_shards(tmp_path / "s", texts, 1)], tokenizer, prefix, workers=1, overwrite=True)

    write(documents(40))
    opened = open_corpora(load(overrides=[f"data.prefix={prefix}"]).data, 1)
    opened.require_unchanged()
    write(documents(40))
    opened.require_unchanged()
    write(documents(41))
    with pytest.raises(DataError, match=rf"{prefix}: prepared again while this run was opening it"):
        opened.require_unchanged()
