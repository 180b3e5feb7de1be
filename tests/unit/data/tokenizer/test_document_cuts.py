"""A document encoded in chunks has the ids of the document encoded whole, for every model that is cut at all."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adversarial import ATOMS, adversarial
from support.prose import documents, train_model

from pause_megatron.data.tokenizer.fast import document_cuts
from pause_megatron.data.tokenizer.fast.document_cuts import PiecewiseEncoder, can_be_cut
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer

JOINED = {"remove_extra_whitespaces": True, "allow_whitespace_only_pieces": False}
MODELS = {
    "ours": {},
    "no prefix": {"add_dummy_prefix": False},
    "spaces joined": JOINED,
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nfkc, case folded, spaces joined": {"normalization_rule_name": "nmt_nfkc_cf", **JOINED},
    "pieces over spaces": {"split_by_whitespace": False},
    "space as suffix": {"treat_whitespace_as_suffix": True},
    "user-defined": {"user_defined_symbols": ["<sep>", "don't", " the", "▁▁x", "a b"]},
    "control": {"control_symbols": ["<pause>", "<0x>"]},
    "any script": {"split_by_unicode_script": False, "split_by_number": False},
}
TEXTS = [
    *ATOMS,
    *documents(40),
    "\n\n".join(documents(60)),
    *(
        "",
        " ",
        " " * 50,
        "a" * 300,
        "a b" * 100,
        "日本語" * 100,
        "\0 \0",
        "▁",
        "▁▁ ▁",
        " x ",
        "x  ",
        "▁a b▁ c",
        "🇩🇪" * 60,
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Name -> the whole model, and the encoder in pieces."""
    found = {}
    for name, options in MODELS.items():
        path = train_model(tmp_path_factory.mktemp("models") / "tok.model", **options)
        whole = sentencepiece.SentencePieceProcessor(model_file=str(path))
        assert can_be_cut(path.read_bytes())
        found[name] = (whole, PiecewiseEncoder(whole, path.read_bytes()))
    return found


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut at every boundary that allows one: many more cuts than the real size makes."""
    monkeypatch.setattr(document_cuts, "CHUNK_CHARACTERS", 1)
    monkeypatch.setattr(document_cuts, "LONG_CHARACTERS", 0)


@pytest.mark.parametrize("name", MODELS)
def test_ids_do_not_depend_on_the_cuts(models, name: str, full: bool, tiny_chunks) -> None:
    whole, pieces = models[name]
    texts = TEXTS + adversarial(seed=len(name), count=20_000 if full else 500)
    for text, expected, ids in zip(texts, whole.encode(texts, num_threads=1), pieces.encode(texts), strict=True):
        assert ids.tolist() == expected, text


def test_chunks_of_the_real_size(models) -> None:
    texts = ["\n".join(documents(300)), "".join(adversarial(9, 300)), " ".join(adversarial(10, 300)), "a" * 3000]
    for whole, pieces in models.values():
        assert [ids.tolist() for ids in pieces.encode(texts)] == whole.encode(texts, num_threads=1)
        chunks = pieces.chunks(whole.normalize(texts[0]))
        assert "".join(chunks) == whole.normalize(texts[0])
    _, pieces = models["ours"]
    assert max(map(len, pieces.chunks(texts[0]))) < document_cuts.CHUNK_CHARACTERS + 100


_characters = st.one_of(st.sampled_from(" \n▁abeth<>."), st.characters(exclude_categories=["Cs"]))
_text = st.lists(st.one_of(st.sampled_from(ATOMS), st.text(_characters, max_size=5)), max_size=12).map("".join)


@settings(max_examples=150)
@given(texts=st.lists(_text, min_size=1, max_size=4))
def test_any_text(models, texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_cuts, "CHUNK_CHARACTERS", 1)
        patch.setattr(document_cuts, "LONG_CHARACTERS", 2)  # some are cut, some are not
        for whole, pieces in models.values():
            assert [ids.tolist() for ids in pieces.encode(texts)] == whole.encode(texts, num_threads=1)


def test_no_cut_is_inside_a_piece(models, tiny_chunks) -> None:
    """The premise of the proof, looked at from the other side: every piece as a text is one chunk."""
    for whole, pieces in models.values():
        for index in range(whole.get_piece_size()):
            assert len(pieces.chunks(whole.id_to_piece(index))) == 1


def test_models_for_which_nothing_is_proven_are_not_cut(tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    for options in ({"model_type": "unigram"}, {"byte_fallback": False}, {"model_type": "char"}):
        path = train_model(tmp_path / "tok.model", **options)
        assert not can_be_cut(path.read_bytes())
        whole = sentencepiece.SentencePieceProcessor(model_file=str(path))
        assert load_tokenizer(path).encode_batch(TEXTS) == whole.encode(TEXTS)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(train_model(tmp_path / "tok.model").read_bytes())
    assert can_be_cut(model.SerializeToString())
    model.pieces[400].type = 5  # UNUSED
    assert not can_be_cut(model.SerializeToString())


def test_the_flat_form_is_the_batch_end_to_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_model(tmp_path / "tok.model"))
    batch, flat = tokenizer.encode_batch(TEXTS), tokenizer.encode_flat(TEXTS)
    assert flat.ids.tolist() == list(itertools.chain.from_iterable(batch))
    assert flat.lengths.tolist() == [len(ids) for ids in batch]
    assert tokenizer.encode_flat([]).ids.size == 0
