"""PauseTokenizer around tokenizers of this project and of megatron-core: which ids are EOD and `<pause>`."""

from __future__ import annotations

import copy
import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import pytest
import tokenizers
from support.corpora import EOD, ByteTokenizer
from support.megatron_tokenizers import build_tokenizer, exported_folder, tiktoken_file, tokenizer_arguments
from support.prose import train_hugging_face, train_model
from transformers import AutoTokenizer

from pause_megatron.data.tokenizer.pause_tokenizer import PauseTokenizer, id_of_token
from pause_megatron.errors import ConfigError


class Padded(ByteTokenizer):
    pad = 300
    unk = 299
    vocab_size = 301
    unique_identifiers: ClassVar = OrderedDict(kind="padded")


def build(kind: str, model: Path | None = None, **given: object) -> object:
    return build_tokenizer(tokenizer_arguments(tokenizer_type=kind, tokenizer_model=model and str(model), **given))


def test_pause_tokenizer() -> None:
    wrapped = PauseTokenizer(ByteTokenizer(), 3)
    assert wrapped.pause_ids == range(257, 260)
    assert (wrapped.vocab_size, wrapped.text_size, wrapped.eod, wrapped.pad) == (260, 257, EOD, -1)
    assert wrapped.fingerprint == "bytes"  # all else is the wrapped tokenizer's
    assert wrapped.detokenize([104, 257, 258, 105]) == "hi"
    for other in (copy.copy(wrapped), copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert other.unique_identifiers == wrapped.unique_identifiers
    inside = PauseTokenizer(Padded(), pause_id=290)
    assert (inside.vocab_size, inside.pad, inside.pause_id) == (301, 300, 290)
    assert PauseTokenizer(ByteTokenizer(), pause_id=300).pause_id == 300  # not the wrapped tokenizer's
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = wrapped.no_such_name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pause_id": EOD}, "pause id: .* got 256, the tokenizer's end-of-document id.*301"),
        ({"pause_id": 300}, "pause id: .* got 300, the tokenizer's padding id"),
        ({"pause_id": 298, "embeddings": 2}, "pause id: .* got 299, the tokenizer's unknown-token id"),
        ({"pause_id": -5}, "pause id: expected 0 or more"),
        ({"embeddings": 0}, "pause.embeddings: expected 1 or more, got 0"),
    ],
)
def test_pause_ids_that_cannot_be_used(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PauseTokenizer(Padded(), **arguments)


def test_sentencepiece(tmp_path: Path) -> None:
    """EOD is the model's, and `<pause>` the first id after it, or its control symbol of that name."""
    plain = PauseTokenizer(build("SentencePieceTokenizer", train_model(tmp_path / "plain.model")))
    assert (plain.eod, plain.pause_id, plain.text_size, plain.vocab_size) == (2, 600, 600, 601)
    control = train_model(tmp_path / "control.model", control_symbols=["<pause>"])
    reserved = PauseTokenizer(build("Llama2Tokenizer", control))
    assert (reserved.eod, reserved.pause_id, reserved.vocab_size) == (2, 3, 600)
    assert reserved.detokenize([3, *reserved.tokenize("the union"), 3]) == "the union"


def test_a_pause_that_is_ordinary_text_is_refused(tmp_path: Path) -> None:
    """Unless its id is given: no id is chosen silently."""
    piece = build("SentencePieceTokenizer", train_model(tmp_path / "a.model", user_defined_symbols=["<pause>"]))
    word = build("HuggingFaceTokenizer", train_hugging_face(tmp_path / "hf", ordinary=["<pause>"]))
    for tokenizer, own in ((piece, 3), (word, 601)):
        after = tokenizer.vocab_size
        message = rf"'<pause>' to be .*, got ordinary text \(id {own}\).*pause_id={after}\).*={own} "
        with pytest.raises(ConfigError, match=message):
            PauseTokenizer(tokenizer)
        assert PauseTokenizer(tokenizer, pause_id=own).vocab_size == after
        assert PauseTokenizer(tokenizer, pause_id=after).vocab_size == after + 1


def test_an_exported_folder_keeps_its_pauses(tmp_path: Path) -> None:
    """The learned rows are used, not new ones behind them."""
    tokenizer = build("HuggingFaceTokenizer", exported_folder(tmp_path / "model", pauses=2))
    assert tokenizer.vocab_size == 602
    wrapped = PauseTokenizer(tokenizer, embeddings=2)
    assert (wrapped.pause_ids, wrapped.vocab_size, wrapped.eod) == (range(600, 602), 602, 2)
    assert id_of_token(tokenizer, "<pause_1>") == 601


def test_a_hugging_face_tokenizer_without_a_pause(tmp_path: Path) -> None:
    wrapped = PauseTokenizer(build("HuggingFaceTokenizer", train_hugging_face(tmp_path / "hf")))
    assert wrapped.pause_id == wrapped.text_size == wrapped.vocab_size - 1
    assert wrapped.detokenize([wrapped.pause_id, *wrapped.tokenize("the union")]) == "the union"


def test_ids_with_holes(tmp_path: Path) -> None:
    """Hugging Face counts tokens: with holes their number is the id of one of them, which must not become a pause."""
    folder = train_hugging_face(tmp_path / "hf")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    size = len(content["model"]["vocab"])
    moved = {token: index + 3 * (index >= size // 2) for token, index in content["model"]["vocab"].items()}
    content["model"]["vocab"] = moved
    for token in content["added_tokens"]:
        token["id"] = moved.setdefault(token["content"], token["id"] + 3)
    path.write_text(json.dumps(content), encoding="utf-8")
    inner = build("HuggingFaceTokenizer", folder)
    wrapped = PauseTokenizer(inner)
    largest = max(AutoTokenizer.from_pretrained(folder).get_vocab().values())
    assert inner.vocab_size <= largest == wrapped.pause_id - 1
    assert wrapped.text_size == wrapped.vocab_size - 1 == wrapped.pause_id


def test_tiktoken(tmp_path: Path) -> None:
    """`<pause>` among the special tokens is used, and never the id of bytes that merge to it."""
    path = tiktoken_file(tmp_path / "vocabulary.json", merges=(b"<p", b"pause>"))
    special = ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>", "<pause>"]
    sizes = {"vocab_size": 268, "tiktoken_num_special_tokens": 10}
    with_pause = build("TikTokenizer", path, tokenizer_special_tokens=special, special_tokens=special, **sizes)
    wrapped = PauseTokenizer(with_pause)
    assert (wrapped.eod, wrapped.pad, wrapped.pause_id, wrapped.vocab_size) == (2, 4, 7, 268)
    without = PauseTokenizer(build("TikTokenizer", path, **sizes))
    assert (without.eod, without.pause_id) == (2, 268)
    text = build("TikTokenizer", tiktoken_file(path, merges=(b"<p", b"<pause>")), **sizes)
    try:
        assert PauseTokenizer(text).pause_id == 268
    except ConfigError as error:  # 0.16 shows such tokens as text, like special ones
        assert "got ordinary text" in str(error)


def test_tokenizers_without_text() -> None:
    """Null: megatron-core 0.16 puts EOD behind the given ids, later releases make it the last of them."""
    null = build("NullTokenizer", vocab_size=256)
    wrapped = PauseTokenizer(null)
    assert (wrapped.eod, wrapped.pause_id, wrapped.pad) == (null.vocab_size - 1, null.vocab_size, -1)
    assert null.vocab_size in (256, 257)


def test_a_token_by_its_text() -> None:
    """Of Hugging Face's own classes too, and of plain dictionaries and lists."""
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<pause>": 7, "<unk>": 1}, "<unk>"))
    assert (id_of_token(library, "<pause>"), id_of_token(library, "b")) == (7, None)

    class Texts:
        def __init__(self, vocab: object) -> None:
            self.vocab = vocab

    for vocab in (["a", "<pause>"], {"a": 0, "<pause>": 1}):
        assert (id_of_token(Texts(vocab), "<pause>"), id_of_token(Texts(vocab), "b")) == (1, None)
    assert id_of_token(object(), "<pause>") is None
