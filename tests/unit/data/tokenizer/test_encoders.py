"""The fast encoder gives the ids of the tokenizer's own library, or is not used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from support.adversarial import ATOMS, adversarial
from support.prose import documents, train_hugging_face, train_model, write_shards
from support.records import c4_texts
from tokenizers import Regex, pre_tokenizers

from pause_megatron.data.prepare.run import prepare, summary
from pause_megatron.data.tokenizer.backends import Encoded
from pause_megatron.data.tokenizer.fast import encoders, gigatoken_documents
from pause_megatron.data.tokenizer.fast.encoders import (
    PROBES,
    CheckedEncoder,
    GigatokenEncoder,
    choose_encoder,
    open_encoder,
)
from pause_megatron.data.tokenizer.fast.gigatoken_documents import gigatoken_document
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError

pytest.importorskip("gigatoken")

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt2, prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "llama3": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(gigatoken_documents.SPLITS[0]), "isolated"), BYTE_LEVEL]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(gigatoken_documents.SPLITS[1]), "isolated"), BYTE_LEVEL]
    ),
}
SENTENCEPIECE = {
    "ours": {},
    "no prefix": {"add_dummy_prefix": False},
    "no pieces of spaces": {"allow_whitespace_only_pieces": False},
    "pieces over spaces": {"split_by_whitespace": False},
    "any script": {"split_by_unicode_script": False, "split_by_number": False},
    "control": {"control_symbols": ["<pause>", "<x>"]},
}


def _hugging_face(folder: Path, pre_tokenizer, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer with special tokens inside and outside its vocabulary."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    model.pre_tokenizer = pre_tokenizer
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(documents(300), trainer)
    model.add_special_tokens(["</s>", "<pause>"])
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json", eod_token="<|endoftext|>")


def _sentencepiece(name: str, folder: Path) -> Tokenizer:
    if name == "mistral":
        import mistral_common

        return load_tokenizer(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
    return load_tokenizer(train_model(folder / "tok.model", **SENTENCEPIECE[name]))


@pytest.fixture(scope="module", params=[*SENTENCEPIECE, "mistral", *PRE_TOKENIZERS, "llama3, whole words"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param in PRE_TOKENIZERS:
        return _hugging_face(folder / "hf", PRE_TOKENIZERS[request.param])
    if request.param == "llama3, whole words":
        return _hugging_face(folder / "hf", PRE_TOKENIZERS["llama3"], ignore_merges=True)
    return _sentencepiece(request.param, folder)


def _assert_equal(tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = tokenizer.encode_flat(texts)
    came = GigatokenEncoder(tokenizer).encode_flat(texts)
    if came.lengths.tolist() == expected.lengths.tolist() and np.array_equal(came.ids, expected.ids):
        return
    different = [text for text in texts if not np.array_equal(*(e.encode_flat([text]).ids for e in _both(tokenizer)))]
    pytest.fail(f"{len(different)} of {len(texts)} differ, the shortest is {min(different, key=len)!r}")


def _both(tokenizer: Tokenizer) -> tuple[Tokenizer, GigatokenEncoder]:
    return tokenizer, GigatokenEncoder(tokenizer)


def test_equal_ids_for_adversarial_text(tokenizer: Tokenizer, full: bool) -> None:
    texts = [*ATOMS, *PROBES, *adversarial(seed=5, count=50_000 if full else 2000)]
    texts += ["".join(adversarial(seed=6, count=200)), "a" * 20_000, " " * 20_000, "日本語" * 3000, "x y" * 9000]
    _assert_equal(tokenizer, texts)


def test_equal_ids_for_speeches(tokenizer: Tokenizer) -> None:
    _assert_equal(tokenizer, [*documents(400), "\n".join(documents(400))])


def test_equal_ids_for_web_text(tokenizer: Tokenizer, full: bool) -> None:
    _assert_equal(tokenizer, list(c4_texts())[: None if full else 400])


def test_a_corpus_does_not_depend_on_the_encoder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_model(tmp_path / "tok.model"))
    shards = write_shards(tmp_path / "shards", [*documents(200), *adversarial(7, 200)], 3)
    made = {}
    for encoder in ("library", "gigatoken", "auto"):
        prepared = prepare([shards], tokenizer, tmp_path / encoder / "c", workers=1, encoder=encoder)
        assert prepared.encoder == ("library" if encoder == "library" else "gigatoken")
        assert f"encoder: {prepared.encoder}" in summary(prepared, "c")
        made[encoder] = [path.read_bytes() for path in sorted((tmp_path / encoder).rglob("c.*")) if path.is_file()]
    assert made["library"] == made["gigatoken"] == made["auto"]
    # Two processes, and a corpus that one encoder made is complete for the other.
    prepare([shards], tokenizer, tmp_path / "two" / "c", workers=2, encoder="gigatoken")
    assert (tmp_path / "two" / "c.bin").read_bytes() == (tmp_path / "library" / "c.bin").read_bytes()
    assert prepare([shards], tokenizer, tmp_path / "two" / "c", encoder="library").already_done


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "another type than BPE"),
        ({"byte_fallback": False}, "without byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes Unicode"),
        ({"remove_extra_whitespaces": True, "allow_whitespace_only_pieces": False}, "removes extra whitespaces"),
        ({"user_defined_symbols": ["<sep>"]}, "user-defined symbols"),
        ({"treat_whitespace_as_suffix": True}, "whitespace as suffix"),
    ],
)
def test_models_that_are_not_proven_are_left_to_their_library(tmp_path: Path, options: dict, reason: str) -> None:
    tokenizer = load_tokenizer(train_model(tmp_path / "tok.model", **options))
    assert choose_encoder("auto", tokenizer) == "library"
    assert open_encoder("library", tokenizer) is tokenizer
    with pytest.raises(
        DataError, match=f"--encoder gigatoken: gigatoken is not proven to give equal ids for .*{reason}"
    ):
        choose_encoder("gigatoken", tokenizer)


def test_hugging_face_files_that_are_not_proven(tmp_path: Path) -> None:
    document = json.loads((train_hugging_face(tmp_path / "hf") / "tokenizer.json").read_bytes())
    gigatoken_document("huggingface", json.dumps(document).encode())
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    other = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    ordinary = [{"id": 600, "content": "<sep>", "special": False}]
    for change, reason in [
        ({"normalizer": {"type": "NFC"}}, "a normalizer"),
        ({"pre_tokenizer": other}, "another pre-tokenizer"),
        ({"pre_tokenizer": None}, "another pre-tokenizer"),
        ({"added_tokens": ordinary}, "tokens added without"),
        ({"model": {**document["model"], "dropout": 0.1}}, "dropout"),
        ({"model": {**document["model"], "type": "WordPiece"}}, "another type than BPE"),
        ({"model": {**document["model"], "byte_fallback": True}}, "byte fallback"),
        ({"model": {**document["model"], "end_of_word_suffix": "</w>"}}, "suffixes"),
    ]:
        with pytest.raises(DataError, match=reason):
            gigatoken_document("huggingface", json.dumps(document | change).encode())


class _Wrong:
    """The tokenizer's ids, but for one text."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text

    def encode_flat(self, texts: list[str]) -> Encoded:
        encoded = self.tokenizer.encode_flat(texts)
        if self.text in texts:
            encoded.ids.setflags(write=True)
            encoded.ids[encoded.lengths[: texts.index(self.text)].sum()] += 1
        return encoded


def test_a_difference_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(train_model(tmp_path / "tok.model"))
    texts = list(documents(100))
    message = r"encoder x: expected the ids of .* use --encoder library"
    with pytest.raises(DataError, match=message):  # among the first documents
        CheckedEncoder(_Wrong(tokenizer, texts[3]), tokenizer, "x").encode_flat(texts)
    monkeypatch.setattr(encoders, "FIRST_CHARACTERS", 0)
    checked = CheckedEncoder(_Wrong(tokenizer, texts[3]), tokenizer, "x")
    with pytest.raises(DataError, match=message):  # each document of the same batch has its turn
        for _ in texts:
            checked.encode_flat(texts)
    long = " ".join(documents(60))
    with pytest.raises(DataError, match=message):  # of a long one, the beginning
        CheckedEncoder(_Wrong(tokenizer, long[: encoders.CHECKED_CHARACTERS]), tokenizer, "x").encode_flat([long])
    with pytest.raises(DataError, match=message):
        CheckedEncoder(_Wrong(tokenizer, PROBES[4]), tokenizer, "x").check(PROBES)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    tokenizer = load_tokenizer(train_model(tmp_path / "tok.model"))
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if it were not installed
    assert choose_encoder("auto", tokenizer) == "library"
    with pytest.raises(DataError, match=r"pip install 'pause-megatron\[fast\]'"):
        choose_encoder("gigatoken", tokenizer)
    with pytest.raises(DataError, match="--encoder: expected one of auto, library, gigatoken, got 'other'"):
        choose_encoder("other", tokenizer)
