"""Training a tokenizer: the same bytes at every run, text comes back, and bad input is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.prose import documents, json_lines, write_shards

from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.data.tokenizer.train import train_tokenizer
from pause_megatron.errors import DataError

TEXTS = documents(400)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), TEXTS, 4)


def test_same_bytes_and_text_comes_back(tmp_path: Path, shards: str) -> None:
    for name in ("a", "b"):
        trained = train_tokenizer([shards], tmp_path / f"{name}.model", vocab_size=700)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert trained.documents == len(TEXTS)
    assert trained.text_bytes == sum(len(text.encode()) for text in TEXTS)
    tokenizer = load_tokenizer(tmp_path / "a.model")
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pause_id) == (700, 2, 700)
    for text in [
        *TEXTS[:100],
        "  two  spaces ",
        "tab\tand\nline\n\nend",
        "naïve 日本語 🎉",
        "in 1790",
        " <pause>",
        "ﬁ ½",
    ]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = [tokenizer.decode([token]) for token in tokenizer.encode("1234567")]
    assert [piece for piece in digits if piece] == list("1234567")


def test_the_model_converts_exactly_to_hugging_face(tmp_path: Path, shards: str) -> None:
    from transformers import LlamaTokenizer

    train_tokenizer([shards], tmp_path / "tokenizer.model", vocab_size=700)
    converted = LlamaTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path / "tokenizer.model")
    for text in TEXTS[:200]:
        assert converted.encode(text, add_special_tokens=False) == ours.encode(text)


def test_the_sample_is_spread_over_the_shards(tmp_path: Path, shards: str) -> None:
    trained = train_tokenizer([shards], tmp_path / "a.model", vocab_size=400, max_documents=21)
    assert trained.documents == 21
    limited = train_tokenizer([shards], tmp_path / "b.model", vocab_size=400, max_bytes=40_000)
    assert 30_000 < limited.text_bytes <= 40_000
    whole = train_tokenizer([shards], tmp_path / "c.model", vocab_size=400, max_documents=10_000)
    assert whole.documents == len(TEXTS)


def test_long_lines_are_not_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines([" ".join(text.replace("\n", " ") for text in TEXTS)]))
    trained = train_tokenizer([str(path)], tmp_path / "a.model", vocab_size=700)
    assert trained.bytes_per_token > 2.5


def test_bad_input(tmp_path: Path, shards: str) -> None:
    output = tmp_path / "a.model"
    small = tmp_path / "small.jsonl"
    small.write_bytes(json_lines(["a few words only"]))
    with pytest.raises(DataError, match=r"--vocab-size: expected at most \d+ for [\d,]+ bytes of text, got 8000"):
        train_tokenizer([str(small)], output, vocab_size=8000)
    small.write_bytes(b'{"body": "x"}\n')
    with pytest.raises(DataError, match=r"(?s)expected documents, got none.*no-text: 1"):
        train_tokenizer([str(small)], output, vocab_size=400)
    whole = Path(shards.replace("*", "00000-of-00004")).read_bytes()
    (tmp_path / "t.json.gz").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"t\.json\.gz: truncated"):
        train_tokenizer([str(tmp_path / "t.json.gz")], output, vocab_size=400)
    with pytest.raises(DataError, match="--vocab-size: expected 260 or more, got 100"):
        train_tokenizer([shards], output, vocab_size=100)
    with pytest.raises(DataError, match=r"ends in \.model"):
        train_tokenizer([shards], tmp_path / "a", vocab_size=400)
    assert not output.exists()
    train_tokenizer([shards], output, vocab_size=400)
    with pytest.raises(DataError, match="expected no such file, got an existing one"):
        train_tokenizer([shards], output, vocab_size=400)
    train_tokenizer([shards], output, vocab_size=500, overwrite=True)
    assert load_tokenizer(output).vocab_size == 500
