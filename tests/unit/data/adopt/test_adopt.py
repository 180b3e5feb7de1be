"""An adopted corpus equals the one that `prepare` would have made; every fault is an error before files are written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from support.megatron_corpora import megatron_tokenizer, preprocess, write_ids
from support.prose import documents, train_hugging_face, train_model, write_shards

import pause_megatron.data.adopt.scan as adopt_scan
from pause_megatron.cli import main
from pause_megatron.config.schema import DataSection, PauseSection
from pause_megatron.data.adopt.run import adopt
from pause_megatron.data.adopt.scan import scan
from pause_megatron.data.adopt.tokenizer_check import agreement_of, sample_documents
from pause_megatron.data.corpus.corpora import open_corpora
from pause_megatron.data.corpus.corpus import open_corpus
from pause_megatron.data.corpus.first_use import verify_at_use
from pause_megatron.data.corpus.index_file import read_header
from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.verify import verify_corpus
from pause_megatron.data.prepare.run import prepare
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.data.windows.build import DatasetOptions, build_datasets
from pause_megatron.errors import DataError
from pause_megatron.terminal.progress import no_report

TEXTS = documents(80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adopt")
    train_model(folder / "tok.model")
    train_hugging_face(folder / "hf")
    write_shards(folder / "shards", TEXTS, 2)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tok.model")


@pytest.fixture(scope="module")
def original(folder: Path) -> Path:
    return preprocess(folder / "original" / "c", TEXTS, *megatron_tokenizer(folder / "tok.model"))


@pytest.fixture
def theirs(original: Path, tmp_path: Path) -> Path:
    for name in ("bin", "idx"):
        shutil.copy(f"{original}.{name}", tmp_path / f"c.{name}")
    return tmp_path / "c"


def there(prefix: Path) -> set[str]:
    """Return the names in a corpus's folder, without its verification records."""
    return {path.name.removeprefix(f"{prefix.name}.") for path in prefix.parent.iterdir()} - {"cache"}


def refusal(prefix: Path, tokenizer: Tokenizer, **options: object) -> str:
    """Return the error of `adopt`, after checking that no file was created or changed."""
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir() if path.is_file()}
    with pytest.raises(DataError) as error:
        adopt(prefix, tokenizer, **options)
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir() if path.is_file()} == before
    return str(error.value)


# The result -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tok.model", "hf"])
def test_an_adopted_corpus_equals_that_of_prepare(folder: Path, tmp_path: Path, capsys, name: str) -> None:
    """The bytes are equal, and so is the fingerprint that checkpoints hold; the verbs accept both corpora."""
    prefix, prepared = (
        preprocess(tmp_path / "theirs" / "c", TEXTS, *megatron_tokenizer(folder / name)),
        tmp_path / "ours" / "c",
    )
    prepare([f"{folder}/shards/*"], load_tokenizer(folder / name), prepared, workers=1)
    assert main(["adopt", str(prefix), "--tokenizer", str(folder / name)]) == 0
    said = capsys.readouterr().out
    assert "80 documents" in said and "80 end with EOD" in said and "agreement: 100.0%" in said
    assert there(prefix) == {"bin", "idx", "manifest.json", "tokenizer"}

    opened, other = open_corpus(prefix, folder / name), open_corpus(prepared)
    assert opened.manifest.fingerprint == other.manifest.fingerprint
    assert (
        opened.manifest.blocks == other.manifest.blocks
        and opened.manifest.counts.tokens == other.manifest.counts.tokens
    )
    assert opened.manifest.made_by == "adopt" and other.manifest.made_by == "prepare"
    assert opened.manifest.sources == [] and opened.manifest.counts.text_bytes is None
    verify_corpus(opened)
    assert not verify_at_use(opened, "once")  # adopt has read every byte

    assert main(["verify", str(prefix)]) == 0
    looks = ("--data.sequence_length", "64", "--windows", "4")
    found = []
    for each in (prefix, prepared):
        capsys.readouterr()
        assert main(["inspect", str(each), "--json", *looks]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["sources"] is None and found[0]["counts"]["text_bytes"] is None
    assert found[0]["fertility"]["per_byte"] == pytest.approx(found[1]["fertility"]["per_byte"])
    assert {key: found[0][key] for key in ("lengths", "policies")} == {
        key: found[1][key] for key in ("lengths", "policies")
    }
    assert main(["inspect", str(prefix), *looks]) == 0
    text = capsys.readouterr().out
    assert "80, adopted: made by another program" in text and "(all over 80 documents)" in text
    assert re.search(r"text +not known", text) and ", of which 80 EOD" in text


def test_a_second_run_does_nothing_and_changes_need_overwrite(theirs: Path, folder: Path, capsys) -> None:
    command = ["adopt", str(theirs), "--tokenizer", str(folder / "tok.model")]
    assert main(command) == 0
    before = Path(f"{theirs}.manifest.json").stat().st_ino
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert Path(f"{theirs}.manifest.json").stat().st_ino == before
    assert main([*command, "--pause-id", "700"]) == 2
    assert "got a corpus that was adopted with" in capsys.readouterr().err
    assert open_corpus(theirs).tokenizer.pause_id == 600
    assert main([*command, "--pause-id", "700", "--overwrite"]) == 0
    assert open_corpus(theirs).tokenizer.pause_id == 700
    assert main(["adopt", str(theirs), "--tokenizer", f"{theirs}.tokenizer", "--overwrite"]) == 0  # its own


def test_prepare_and_adopt_do_not_replace_each_others_corpora(theirs: Path, folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=rf"got a file without a manifest.*pause-megatron adopt {theirs} --tokenizer"):
        prepare([f"{folder}/shards/*"], tokenizer, theirs, workers=1)
    adopt(theirs, tokenizer)
    with pytest.raises(DataError, match="got an adopted corpus"):
        prepare([f"{folder}/shards/*"], tokenizer, theirs, workers=1)
    prepare([f"{folder}/shards/*"], tokenizer, theirs, workers=1, overwrite=True)
    assert "got a corpus that was prepared with" in refusal(theirs, tokenizer)
    Path(f"{theirs}.manifest.json").unlink()
    Path(f"{theirs}.parts").mkdir()
    assert "got an unfinished preparation" in refusal(theirs, tokenizer)


def test_a_missing_manifest_names_the_command(theirs: Path, capsys) -> None:
    assert main(["verify", str(theirs)]) == 2
    said = capsys.readouterr().out
    assert said.startswith(f"UNKNOWN  {theirs}\n") and f"`pause-megatron adopt {theirs} --tokenizer T`" in said
    assert main(["inspect", str(theirs)]) == 2
    assert f"`pause-megatron adopt {theirs} --tokenizer T`" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_every_integer_dtype_gives_the_same_windows(folder: Path, original: Path, tmp_path: Path, dtype: type) -> None:
    tokenizer = load_tokenizer(folder / "tok.model")
    prefix = preprocess(tmp_path / "c", TEXTS, *megatron_tokenizer(folder / "tok.model"), dtype=dtype)
    manifest = adopt(prefix, tokenizer).manifest
    assert manifest.dtype == dtype.__name__
    assert not verify_at_use(open_corpus(prefix), "never") and CorpusManifest.load(prefix) == manifest
    verify_corpus(open_corpus(prefix))

    def windows(prefix: Path) -> list[list[int]]:
        train = build_datasets(
            DatasetOptions(
                [str(prefix)],
                split="1,0,0",
                sequence_length=64,
                tokenizer=tokenizer,
                pause=PauseSection(rate=0.1),
                seed=1,
                train_samples=20,
                valid_samples=0,
                cache=str(tmp_path / "cache"),
            )
        ).train
        return [train[number]["tokens"].tolist() for number in range(20)]

    assert windows(prefix) == windows(original)


def test_empty_texts(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """preprocess_data.py writes a document end without a sequence for them; datasets skip it."""
    texts = ["", *TEXTS[:40], "", "", *TEXTS[40:], ""]
    prefix = preprocess(tmp_path / "c", texts, *megatron_tokenizer(folder / "tok.model"))
    assert adopt(prefix, tokenizer).manifest.counts.documents == 80
    assert read_header(f"{prefix}.idx").ends == 85
    verify_corpus(open_corpus(prefix))


def test_manifests_of_the_second_version_are_still_read(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepare([f"{folder}/shards/*"], tokenizer, tmp_path / "c", workers=1)
    path = tmp_path / "c.manifest.json"
    value = json.loads(path.read_bytes())
    old = {key: item for key, item in value.items() if key not in ("adoption", "digest")} | {"version": 2}
    digest = f"xxh3_128:{xxhash.xxh3_128_hexdigest(json.dumps(old, sort_keys=True).encode())}"
    path.write_text(json.dumps({**old, "digest": digest}))
    assert open_corpus(tmp_path / "c").manifest.adoption is None
    path.write_text(json.dumps({**old, "digest": digest, "text_key": "txt"}))
    with pytest.raises(DataError, match="edited or damaged"):
        open_corpus(tmp_path / "c")


# Invalid ids ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_pause(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with <pause> and two further unused tokens."""
    return train_hugging_face(tmp_path_factory.mktemp("special") / "hf", special=("</s>", "<pause>", "<a>", "<b>"))


def test_literal_pauses_are_found_with_a_remedy(with_pause: Path, tmp_path: Path, capsys) -> None:
    texts = [*TEXTS[:7], "One <pause>two <pause> three", *TEXTS[7:], "<pause>"]
    prefix = preprocess(tmp_path / "c", texts, *megatron_tokenizer(with_pause))
    tokenizer = load_tokenizer(with_pause)
    ids = megatron_tokenizer(with_pause)[0](texts[7])
    first, second = (place for place, token in enumerate(ids) if token == tokenizer.pause_id)
    said = refusal(prefix, tokenizer)
    assert f"the pause id {tokenizer.pause_id} ('<pause>') 3 times: " in said
    assert f"document 7, token {first}; document 7, token {second}; document 81, token 0." in said
    assert f"--pause-id {tokenizer.vocab_size}" in said and "pause-megatron prepare" in said
    assert main(["adopt", str(prefix), "--tokenizer", str(with_pause), "--pause-id", str(tokenizer.vocab_size)]) == 0
    assert open_corpus(prefix).tokenizer.pause_id == tokenizer.vocab_size


def test_further_pause_ids_that_the_corpus_holds(with_pause: Path, tmp_path: Path) -> None:
    """With K pause embeddings the K - 1 ids after <pause> are pauses too; a run refuses a corpus that has them."""
    prefix = preprocess(tmp_path / "c", [*TEXTS, "a <b> c"], *megatron_tokenizer(with_pause))
    assert adopt(prefix, load_tokenizer(with_pause)).manifest.adoption.free_pause_ids == 2
    data = DataSection(prefix=[str(prefix)])
    assert open_corpora(data, 2).corpora[0].prefix == str(prefix)
    with pytest.raises(DataError, match=r"pause\.embeddings: expected 2 or less, since id \d+ occurs in .*, got 3"):
        open_corpora(data, 3)


def test_ids_out_of_range(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    encode, eod, _ = megatron_tokenizer(folder / "tok.model")
    ids = [[*encode(text), eod] for text in [*TEXTS, "\n".join(TEXTS[:10])]]
    assert len(ids[80]) > 1500
    for position, value, dtype in [(3, 600, np.uint16), (1200, 65535, np.uint16), (1200, -1, np.int32)]:
        wrong = [*ids[:80], [*ids[80][:position], value, *ids[80][position + 1 :]]]
        said = refusal(write_ids(tmp_path / f"{position}{value}" / "c", wrong, dtype), tokenizer)
        if position == 3:  # inside the sample
            assert "document 80: expected ids 0 to 599 of the tokenizer, got 600" in said
        else:
            assert (
                f"1 ids outside the tokenizer's 0 to 599, from {value:,} to {value:,}: document 80, token 1,200" in said
            )


@settings(max_examples=60)
@given(
    ids=st.lists(st.lists(st.sampled_from([1, 2, 5, 6, 599, 600, 650]), max_size=7), min_size=1, max_size=12),
    piece=st.integers(1, 9),
)
def test_scan_finds_what_a_loop_over_documents_finds(tmp_path_factory, folder: Path, ids, piece: int) -> None:
    """For any block size, also with empty documents at any position."""
    prefix = write_ids(tmp_path_factory.mktemp("scan") / "c", ids)
    tokenizer = load_tokenizer(folder / "tok.model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adopt_scan, "READ_BYTES", 2 * piece)
        patch.setattr(adopt_scan, "SHOWN", 100)
        found = scan(prefix, read_header(f"{prefix}.idx"), tokenizer, no_report)
    flat = [(document, offset, token) for document, row in enumerate(ids) for offset, token in enumerate(row)]
    if not flat:
        return
    assert found.tokens == len(flat) and found.eod == sum(token == 2 for *_, token in flat)
    assert found.outside.places == [(document, offset) for document, offset, token in flat if token >= 600]
    assert found.special.get(1, 0) == sum(token == 1 for *_, token in flat) and found.special.keys() <= {1}
    ends = [(document, max(len(row) - 1, 0)) for document, row in enumerate(ids) if row[-1:] != [2]]
    assert found.without_eod.places == ends and found.without_eod.count == len(ends)


# The right tokenizer --------------------------------------------------------------------------------------------------


LOSSY = {"model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nmt_nfkc_cf"}


@pytest.mark.parametrize(
    "settings", [{"vocab_size": 700}, {"user_defined_symbols": "<x>"}, {"model_type": "unigram", "vocab_size": 700}]
)
def test_wrong_tokenizers(theirs: Path, tmp_path: Path, settings: dict) -> None:
    """Each has a token for every id of the corpus."""
    said = refusal(theirs, load_tokenizer(train_model(tmp_path / "wrong.model", **settings)))
    assert "encoded with a different tokenizer. Decoded with this one, it starts: " in said


def test_a_tokenizer_that_reproduces_everything_is_a_warning(theirs: Path, tmp_path: Path, capsys) -> None:
    """A unigram model can reproduce any text made of its pieces, so the user must check the text."""
    wrong = train_model(tmp_path / "wrong.model", **LOSSY, remove_extra_whitespaces=True)
    assert main(["adopt", str(theirs), "--tokenizer", str(wrong)]) == 0
    out, err = capsys.readouterr()
    assert "a wrong tokenizer would not be detected: check that the text above reads well" in err
    assert re.search(r"it begins: '.*'", out)


def test_right_tokenizers_agree_more_than_random_order(folder: Path, tmp_path: Path) -> None:
    """Also a lossy one, which lowercases the text and lacks some characters."""
    lossy = train_model(tmp_path / "lossy.model", **LOSSY, vocab_size=1000, remove_extra_whitespaces=True)
    for place in (folder / "tok.model", folder / "hf", lossy):
        prefix = preprocess(tmp_path / place.stem / "c", TEXTS, *megatron_tokenizer(place))
        found = agreement_of(load_tokenizer(place), sample_documents(prefix, read_header(f"{prefix}.idx")))
        assert found.conclusive and found.by_chance < 0.8 and found.needed < 0.91 <= found.share
        assert found.text.lower().split()[:5] == TEXTS[0].lower().split()[:5]
        assert (found.share == 1) == (place != lossy)


def test_a_lower_agreement_can_be_allowed(theirs: Path, tmp_path: Path, capsys) -> None:
    wrong = str(train_model(tmp_path / "wrong.model", vocab_size=700))
    assert main(["adopt", str(theirs), "--tokenizer", wrong, "--min-agreement", "0.1"]) == 0
    assert open_corpus(theirs).manifest.adoption.agreement < 0.9
    assert main(["adopt", str(theirs), "--tokenizer", wrong, "--min-agreement", "2"]) == 2
    assert "expected a number from 0 to 1" in capsys.readouterr().err


def test_special_tokens_in_texts_do_not_lower_the_agreement(folder: Path, tmp_path: Path) -> None:
    """Megatron-LM encodes a literal </s> as EOD, and some tokenizers put a BOS first."""
    encode, eod, size = megatron_tokenizer(folder / "hf")
    texts = [text.replace(". ", ". </s>", 1) for text in TEXTS]
    prefix = preprocess(tmp_path / "c", texts, encode, eod, size)
    inside = sum("</s>" in text for text in texts)
    adopted = adopt(prefix, load_tokenizer(folder / "hf"))
    assert inside > 20 and adopted.manifest.adoption.eod == 80 + inside and adopted.agreement.share > 0.9


def test_special_tokens_in_the_text_are_shown(folder: Path, tmp_path: Path, capsys) -> None:
    """No other check detects a tokenizer with other tokens at these ids."""
    tokenizer = load_tokenizer(folder / "tok.model")
    rows = [[1, *tokenizer.encode(text), 2] for text in TEXTS]
    prefix = write_ids(tmp_path / "c", rows)
    assert main(["adopt", str(prefix), "--tokenizer", str(folder / "tok.model")]) == 0
    assert (
        f"special tokens in the text: '<s>' {len(rows)} times; check that they belong there" in capsys.readouterr().out
    )


def test_an_eod_that_a_legacy_tokenizer_added(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    encode, _, size = megatron_tokenizer(folder / "tok.model")
    prefix = preprocess(tmp_path / "c", TEXTS, encode, size + 2, size + 5)
    said = refusal(prefix, tokenizer)
    assert "100% of the sampled documents end with 602: an EOD that the tokenizer's file does not have." in said
    assert "--legacy-tokenizer" in said


# EOD ------------------------------------------------------------------------------------------------------------------


def test_no_eod(folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys) -> None:
    encode, _, size = megatron_tokenizer(folder / "tok.model")
    prefix = preprocess(tmp_path / "c", TEXTS, encode, None, size)
    said = refusal(prefix, tokenizer)
    assert "expected EOD 2 ('</s>') at the end of each document, got it in 0 of 80" in said and "--append-eod" in said
    assert main(["adopt", str(prefix), "--tokenizer", str(folder / "tok.model"), "--missing-eod", "keep"]) == 0
    assert "; 0 end with EOD 2" in capsys.readouterr().out
    assert open_corpus(prefix).manifest.adoption.without_eod == 80
    assert main(["inspect", str(prefix), "--data.sequence_length", "64", "--windows", "2"]) == 0
    assert "; 80 do not end with EOD" in capsys.readouterr().out


def test_another_eod_is_named(folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys) -> None:
    encode, _, size = megatron_tokenizer(folder / "tok.model")
    prefix = preprocess(tmp_path / "c", TEXTS, encode, 1, size)
    assert "100% end with 1 ('<s>'): if that is the EOD, give --eod-token '<s>'" in refusal(prefix, tokenizer)
    assert main(["adopt", str(prefix), "--tokenizer", str(folder / "tok.model"), "--eod-token", "<s>"]) == 0


def test_a_few_without_eod_and_one_without_tokens(folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys) -> None:
    encode, eod, _ = megatron_tokenizer(folder / "tok.model")
    ids = [[*encode(text), eod] for text in TEXTS]
    ids[0], ids[30], ids[79] = [], ids[30][:-1], []
    prefix = write_ids(tmp_path / "c", ids)
    said = refusal(prefix, tokenizer)
    places = f"document 0, token 0; document 30, token {len(ids[30]) - 1}; document 79, token 0 "
    assert f"3 documents that do not end with EOD 2 ('</s>'): {places}" in said
    adopt(prefix, tokenizer, missing_eod="keep")
    capsys.readouterr()
    assert main(["inspect", str(prefix), "--json", "--data.sequence_length", "64", "--windows", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"]["shortest"] == 0 and found["lengths"]["edges"][:2] == [0, 1]
    assert found["lengths"]["counts"][0] == 2 and sum(found["lengths"]["counts"]) == 80


# Files ----------------------------------------------------------------------------------------------------------------


def test_truncated_missing_and_foreign_files(theirs: Path, tokenizer: Tokenizer) -> None:
    whole = {name: Path(f"{theirs}.{name}").read_bytes() for name in ("bin", "idx")}
    size = len(whole["bin"])

    def changed(name: str, content: bytes) -> str:
        Path(f"{theirs}.{name}").write_bytes(content)
        said = refusal(theirs, tokenizer)
        Path(f"{theirs}.{name}").write_bytes(whole[name])
        return said

    for content in (b"", whole["bin"][:-1], whole["bin"][:-2], whole["bin"] + b"\0"):
        assert f"c.bin: expected {size:,} bytes, the size in c.idx, got {len(content):,}" in changed("bin", content)
    for cut in (0, 5, 33, 34, 500, len(whole["idx"]) - 1):
        assert re.search(
            r"c\.idx: (expected a Megatron index|.*the file was truncated)", changed("idx", whole["idx"][:cut])
        )
    for at, form, value, message in [
        (0, "<B", 0, "magic bytes"),
        (9, "<Q", 2, "got version 2 with 8"),
        (17, "<B", 7, r"expected version 1 with a dtype code of 1 \(uint8\), .*, got version 1 with 7"),
        (17, "<B", 4, "expected .* bytes, the size in c.idx"),
        (34 + 4, "<i", -3, "sequence 1: expected 0 or more tokens at byte"),
        (34 + 4 * 80 + 8 * 5, "<q", 0, "sequence 5: expected 0 or more tokens at byte .* got .* at byte 0"),
        (34 + 12 * 80 + 8 * 9, "<q", 40, "document 8: expected one sequence per document"),
        (34 + 12 * 80, "<q", 2, "document 0: expected one sequence per document"),
        (34 + 12 * 80 + 8 * 80, "<q", 79, "expected its documents to end at sequence 80, got 79"),
    ]:
        content = bytearray(whole["idx"])
        struct.pack_into(form, content, at, value)
        assert re.search(message, changed("idx", bytes(content)))
    Path(f"{theirs}.idx").unlink()
    said = refusal(theirs, tokenizer)
    assert (
        f"{theirs}.idx: expected the .idx file of a corpus, got no such file; preprocess_data.py writes it at its end"
        in said
    )


def test_a_wrong_prefix_suggests_the_right_one(theirs: Path, tokenizer: Tokenizer) -> None:
    for wrong in (Path(f"{theirs}.bin"), Path(f"{theirs}.idx")):
        assert f"did you mean {theirs}?" in refusal(wrong, tokenizer)
    os.rename(f"{theirs}.bin", f"{theirs}_text_document.bin")
    assert f"did you mean {theirs}_text_document?" in refusal(theirs, tokenizer)


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_empty_corpora(tokenizer: Tokenizer, tmp_path: Path, documents: Sequence[list[int]]) -> None:
    assert "c.idx: expected documents, got none with a token" in refusal(
        write_ids(tmp_path / "c", documents), tokenizer
    )


def test_documents_without_ends(tokenizer: Tokenizer, tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.uint16)
    for _ in range(3):
        builder.add_item(torch.tensor([5, 6, 2]))
    builder.finalize(str(tmp_path / "c.idx"))
    said = refusal(tmp_path / "c", tokenizer)
    assert "expected a document end for each of its 3 sequences, got none" in said and "end_document()" in said
    assert "--split-sentences" not in said


def test_sentences_images_and_floats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.uint16)
    builder.add_document([5, 6, 2], [3])
    builder.add_document([5, 6, 7, 2], [2, 2])
    builder.finalize(str(tmp_path / "c.idx"))
    said = refusal(tmp_path / "c", tokenizer)
    assert (
        "document 0: expected one sequence per document, got 3 sequences in 2 documents" in said
        and "--split-sentences" in said
    )
    said = refusal(write_ids(tmp_path / "m" / "c", [[5, 2]], multimodal=True), tokenizer)
    assert "multimodal" in said
    assert "got version 1 with 7" in refusal(write_ids(tmp_path / "f" / "c", [[5, 2]], np.float32), tokenizer)


def test_written_to_while_it_is_read(theirs: Path, tokenizer: Tokenizer) -> None:
    def touch(stage: str, done: int, total: int) -> None:
        if stage.startswith("scan"):
            os.utime(f"{theirs}.bin")

    with pytest.raises(DataError, match="was modified during the scan"):
        adopt(theirs, tokenizer, report=touch)
    assert there(theirs) == {"bin", "idx"}


def test_a_read_only_corpus_is_adopted_through_symbolic_links(
    original: Path, tokenizer: Tokenizer, monkeypatch
) -> None:
    """A corpus in a read-only folder is adopted through symbolic links."""
    with tempfile.TemporaryDirectory() as name:  # pytest's folder is accessible only to this user
        folder, mine = Path(name) / "their", Path(name) / "my"
        shutil.copytree(original.parent, folder, copy_function=shutil.copyfile)
        mine.mkdir()
        for path, mode in ((Path(name), 0o755), (folder, 0o555), (mine, 0o777)):
            path.chmod(mode)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            said = refusal(folder / "c", tokenizer)
            assert "Permission denied. The manifest is written beside the corpus: create links" in said
            assert f"`ln -s {folder}/c.bin {folder}/c.idx .`" in said
            for extension in ("bin", "idx"):
                (mine / f"c.{extension}").symlink_to(folder / f"c.{extension}")
            adopt(mine / "c", tokenizer)
            verify_corpus(open_corpus(mine / "c"))
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert there(folder / "c") == {"bin", "idx"}


def test_a_folder_in_the_tokenizers_place(theirs: Path, tokenizer: Tokenizer) -> None:
    Path(f"{theirs}.tokenizer").mkdir()
    Path(f"{theirs}.tokenizer", "precious").touch()
    assert "expected the corpus's tokenizer or no such folder, got one of another program" in refusal(theirs, tokenizer)
    assert Path(f"{theirs}.tokenizer", "precious").exists()


# Killed ---------------------------------------------------------------------------------------------------------------

_KILLED = """
import os, signal, sys
folder, left = sys.argv[1], int(sys.argv[2])
from pause_megatron.data.adopt.run import adopt
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer

tokenizer = load_tokenizer(sys.argv[3])

def hook(event, arguments):
    global left
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if armed and (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")):
        if str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

armed = False
sys.addaudithook(hook)
for number in range(1, 30):
    child = os.fork()
    if child == 0:
        armed, left = True, number
        adopt(f"{folder}/{number}/c", tokenizer, overwrite=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(number, status, flush=True)
    if status == 0:
        break
"""


@pytest.mark.parametrize("adopted_before", [False, True])
def test_killed_at_every_file_operation_and_started_again(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, adopted_before: bool
) -> None:
    """The manifest is always complete or absent; the same command then succeeds; .bin and .idx are unchanged."""
    few = preprocess(tmp_path / "few" / "c", TEXTS[:12], *megatron_tokenizer(folder / "tok.model"))
    content = {name: Path(f"{few}.{name}").read_bytes() for name in ("bin", "idx")}
    if adopted_before:
        adopt(few, load_tokenizer(folder / "tok.model", pause_id=700))
    for number in range(1, 30):
        shutil.copytree(few.parent, tmp_path / str(number))
    command = [sys.executable, "-c", _KILLED, str(tmp_path), "0", str(folder / "tok.model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    statuses = dict(map(int, line.split()) for line in done.stdout.splitlines())
    *killed, finished = statuses
    assert len(killed) > 7 and {statuses[number] for number in killed} == {signal.SIGKILL}, done.stderr
    assert statuses[finished] == 0
    for number in killed:
        prefix = tmp_path / str(number) / "c"
        if Path(f"{prefix}.manifest.json").exists():
            verify_corpus(open_corpus(prefix))
        adopt(prefix, tokenizer, overwrite=True)
        assert there(prefix) == {"bin", "idx", "manifest.json", "tokenizer"}
        assert open_corpus(prefix).tokenizer.pause_id == 600
        for name in ("bin", "idx"):
            assert Path(f"{prefix}.{name}").read_bytes() == content[name]


def test_killed_in_the_middle_of_the_reading(theirs: Path, folder: Path, tokenizer: Tokenizer) -> None:
    code = (
        "import sys, time; from pause_megatron.data.adopt.run import adopt;"
        "from pause_megatron.data.tokenizer.tokenizer import load_tokenizer\n"
        "def report(stage, done, total):\n"
        "    if stage.startswith('scan'):\n        print(stage, flush=True); time.sleep(100)\n"
        "adopt(sys.argv[1], load_tokenizer(sys.argv[2]), report=report)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(theirs), str(folder / "tok.model")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "scan c\n"
    said = refusal(theirs, tokenizer)
    assert "another process is working on corpus" in said
    process.kill()
    process.wait()
    assert there(theirs) == {"bin", "idx", "lock"}
    adopt(theirs, tokenizer)
    assert there(theirs) == {"bin", "idx", "manifest.json", "tokenizer"}


# Size -----------------------------------------------------------------------------------------------------------------


def test_memory_is_flat(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A corpus of 600 MB and 3 million documents, scanned in memory that does not grow with it."""
    code = (
        "import resource, sys; import numpy as np; from pathlib import Path\n"
        "from pause_megatron.data.adopt.scan import scan\n"
        "from pause_megatron.data.corpus.index_file import check_entries, read_header, write_index\n"
        "from pause_megatron.data.tokenizer.tokenizer import load_tokenizer\n"
        "from pause_megatron.files.durable import DigestFile\n"
        "folder, documents, length = Path(sys.argv[1]), int(sys.argv[3]), 100\n"
        "file = DigestFile(folder / 'c.idx')\n"
        "lengths = lambda: (np.full(min(1 << 18, documents - n), length) for n in range(0, documents, 1 << 18))\n"
        "write_index(file, 'uint16', documents, lengths); file.publish()\n"
        "open(folder / 'c.bin', 'wb').truncate(2 * length * documents)\n"
        "tokenizer = load_tokenizer(sys.argv[2])\n"
        "header = read_header(folder / 'c.idx')\n"
        "check_entries(folder / 'c.idx', header, lambda read: None)\n"
        "found = scan(folder / 'c', header, tokenizer, lambda *report: None)\n"
        "assert found.without_eod.count == documents and len(found.without_eod.places) == 5\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )

    def peak(documents: int) -> int:
        place = tmp_path / str(documents)
        place.mkdir()
        command = [sys.executable, "-c", code, str(place), str(folder / "tok.model"), str(documents)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout)

    small, large = peak(30_000), peak(3_000_000)
    assert large - small < 120_000, (small, large)  # KiB; the ids are 600 MB, the entries of the index 60 MB
