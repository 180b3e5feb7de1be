"""Tokenizers: decoding inverts encoding, `<pause>` is out of reach of text, fingerprints are of content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.prose import documents, train_hugging_face, train_model

from pause_megatron.data.tokenizer.backends import open_backend
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_model(folder / "tok.model")
    train_hugging_face(folder / "hf", special=("</s>", "<pad>", "<pause>", "<reserved>"))
    return folder


@pytest.fixture(scope="module", params=["tok.model", "hf"])
def tokenizer(folder: Path, request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(folder / request.param)


# "\u2581" is SentencePiece's own sign for a space and comes back as one.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=60)


@settings(max_examples=150)
@given(text=TEXT)
def test_decoding_inverts_encoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100)
@given(
    around=st.lists(TEXT, min_size=2, max_size=4), token=st.sampled_from(["<pause>", "</s>", "<s>", "<unk>", "<pad>"])
)
def test_literal_special_tokens_stay_text(tokenizer: Tokenizer, around: list[str], token: str) -> None:
    text = token.join(around)
    ids = tokenizer.encode(text)
    assert tokenizer.pause_id not in ids
    assert tokenizer.eod not in ids
    assert tokenizer.decode(ids) == text


def test_batch_is_one_by_one(tokenizer: Tokenizer) -> None:
    texts = list(documents(50))
    assert [list(ids) for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_documents_are_not_truncated(tokenizer: Tokenizer) -> None:
    text = " ".join(documents(20))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50)
@given(places=st.lists(st.integers(1, 40), max_size=12))
def test_pauses_are_shown_where_they_stand(tokenizer: Tokenizer, places: list[int]) -> None:
    text = documents(3)[2]
    ids = tokenizer.encode(text)
    for place in sorted(places, reverse=True):
        ids.insert(place, tokenizer.pause_id)
    shown = tokenizer.decode(ids, pause_text="\0")
    assert shown.count("\0") == len(places)
    assert shown.replace("\0", "") == text
    assert tokenizer.decode(ids, pause_text="") == text


def test_further_pause_embeddings_and_document_ends_are_shown(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tok.model")
    ids = [*tokenizer.encode("one"), tokenizer.vocab_size + 2, *tokenizer.encode("x")[1:], tokenizer.eod]
    assert tokenizer.decode([*ids, *tokenizer.encode("two")], eod_text="|").endswith("|two")
    assert tokenizer.decode(ids).startswith("one<pause>")


def test_reserved_ids(folder: Path) -> None:
    sentencepiece = load_tokenizer(folder / "tok.model")
    assert sentencepiece.pause_id == sentencepiece.vocab_size == 600
    hugging_face = load_tokenizer(folder / "hf")
    own = json.loads((folder / "hf" / "tokenizer.json").read_text())["added_tokens"]
    assert hugging_face.pause_id == next(token["id"] for token in own if token["content"] == "<pause>")
    reserved = next(token["id"] for token in own if token["content"] == "<reserved>")
    assert load_tokenizer(folder / "hf", pause_id=reserved).pause_id == reserved


def test_saved_folder_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    for name in ("kind", "vocab_size", "eod", "pause_id", "fingerprint"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.encode(documents(1)[0]) == tokenizer.encode(documents(1)[0])


def test_fingerprint_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.model"
    copy.write_bytes((folder / "tok.model").read_bytes())
    assert load_tokenizer(copy).fingerprint == load_tokenizer(folder / "tok.model").fingerprint
    other = train_model(tmp_path / "other.model", vocab_size=500)
    assert load_tokenizer(other).fingerprint != load_tokenizer(copy).fingerprint


def test_fast_tokenizer_through_transformers_gives_the_same_ids(folder: Path) -> None:
    text = " ".join(documents(10))
    assert load_tokenizer(f"hf:{folder / 'hf'}").encode(text) == load_tokenizer(folder / "hf").encode(text)


def test_control_piece_is_used_as_the_pause(tmp_path: Path) -> None:
    path = train_model(tmp_path / "control.model", control_symbols=["<pause>"])
    tokenizer = load_tokenizer(path)
    assert tokenizer.pause_id == 3
    assert 3 not in tokenizer.encode("a <pause> b<pause>")


@pytest.mark.parametrize(("role", "pause_id"), [("EOD", 2), ("BOS", 1), ("UNK", 0), ("PAD", 3)])
def test_pause_id_of_another_role_is_refused(tmp_path: Path, role: str, pause_id: int) -> None:
    path = train_model(tmp_path / "padded.model", pad_id=3)
    with pytest.raises(DataError, match=f"pause id: .* got {pause_id}, the tokenizer's {role} id"):
        load_tokenizer(path, pause_id=pause_id)


def test_pause_id_that_is_pad_of_a_hugging_face_tokenizer_is_refused(folder: Path) -> None:
    pad = open_backend(str(folder / "hf")).id_of("<pad>")
    with pytest.raises(DataError, match="PAD id"):
        load_tokenizer(folder / "hf", pause_id=pad)


def test_pause_id_that_text_reaches_is_refused(tokenizer: Tokenizer, folder: Path) -> None:
    path = folder / ("tok.model" if tokenizer.kind == "sentencepiece" else "hf")
    with pytest.raises(DataError, match="ordinary piece"):
        load_tokenizer(path, pause_id=tokenizer.encode("the")[-1])


def test_several_pause_ids_must_all_be_free(folder: Path, tmp_path: Path) -> None:
    load_tokenizer(folder / "tok.model").check_pause_ids(64)
    load_tokenizer(folder / "hf").check_pause_ids(2)  # <pause>, <reserved>
    control = load_tokenizer(train_model(tmp_path / "control.model", control_symbols=["<pause>"]))
    with pytest.raises(DataError, match=r"pause id: .* got 4, an ordinary piece"):
        control.check_pause_ids(2)


def test_pause_as_a_piece_of_ordinary_text_is_refused(tmp_path: Path) -> None:
    path = train_model(tmp_path / "user.model", user_defined_symbols=["<pause>"])
    with pytest.raises(DataError, match=r"a piece that text encodes to.*CONTROL"):
        load_tokenizer(path)
    folder = train_hugging_face(tmp_path / "hf", ordinary=["<pause>"])
    with pytest.raises(DataError, match=r'a piece that text encodes to.*"special": true'):
        load_tokenizer(folder)


def test_end_of_document(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes((folder / "hf" / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="--eod-token"):
        load_tokenizer(bare)
    assert load_tokenizer(bare, eod_token="</s>").eod == load_tokenizer(folder / "hf").eod
    with pytest.raises(DataError, match=r"--eod-token: .* got '<nothing>'"):
        load_tokenizer(bare, eod_token="<nothing>")
    without = train_model(tmp_path / "no-eos.model", eos_id=-1)
    with pytest.raises(DataError, match="expected an end-of-sequence token, got none"):
        load_tokenizer(without)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b'{"a": 1}'])
@pytest.mark.parametrize("name", ["bad.model", "tokenizer.json"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: expected a (SentencePiece model|Hugging Face tokenizer.json), got "):
        load_tokenizer(path)


def test_missing_and_altered(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a SentencePiece .* got no such file"):
        load_tokenizer(tmp_path / "nothing.model")
    load_tokenizer(folder / "tok.model").save(tmp_path / "saved")
    other = train_model(tmp_path / "other.model", vocab_size=500)
    (tmp_path / "saved" / "tokenizer.model").write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="its files were altered"):
        load_tokenizer(tmp_path / "saved")


def test_lone_surrogates_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"item 1: .* got the lone surrogate U\+D800 at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud800"])
