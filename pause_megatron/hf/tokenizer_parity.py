"""Parity check of tokenizers: native token ids and those of an export, on lines of text of the run's corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pause_megatron.data.corpus.corpora import open_corpora
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, ids_before
from pause_megatron.errors import CheckpointError, PauseMegatronError
from pause_megatron.hf.checkpoint import NativeCheckpoint

_LINES = 2000
_CORPUS_TOKENS = 200_000

SENTENCES = (
    "The committee met on Tuesday, 4 March 1997, and adjourned at 11:45 a.m. without a vote.",
    "She asked how many apples were left; there were 3,141 of them, or about 12.5 % of the harvest.",
    "It isn't what we don't know that gives us trouble, it's what we know that ain't so.",
    "Water boils at 100 °C (212 °F) at sea level, but at 8,848 m it boils at roughly 70 °C.",
    "for i in range(10):\n    print(f'{i:>3} squared is {i**2}')",
    "The naïve café owner — Zoë, née Müller — paid €42.50 for a crème brûlée.",
    "東京は日本の首都です。 Москва — столица России. القاهرة عاصمة مصر.",
    "Two  spaces, three   spaces, a tab\tand a smile 🙂 end this line.",
    "http://example.org/a/b?c=d&e=f#g is a link; user.name+tag@example.com is an address.",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism, pneumonoultramicroscopicsilicovolcanoconiosis!",
)
"""Text for checkpoints without their corpus: digits, punctuation, code, other scripts, runs of spaces."""


def corpus_tokens(checkpoint: NativeCheckpoint, least: int = 0) -> tuple[np.ndarray, str]:
    """Return text tokens, int64 [tokens], and their source: the corpus of the run if it exists.

    Args:
        checkpoint: A checkpoint of the run.
        least: Minimum number of tokens of the built-in sentences, which are repeated.
    """
    try:
        corpora = open_corpora(checkpoint.config.data, checkpoint.config.pause.embeddings)
        if corpora.corpora and corpora.fingerprint == checkpoint.reader.manifest.corpus:
            corpus = corpora.corpora[0]
            tokens = np.memmap(path_of(corpus.prefix, "bin"), dtype=corpus.manifest.dtype, mode="r")
            return np.array(tokens[:_CORPUS_TOKENS], dtype=np.int64), "corpus"
    except (PauseMegatronError, OSError, ValueError):
        pass  # moved or removed; an imported model has none
    ids = [i for text in checkpoint.tokenizer.encode_batch(SENTENCES) for i in (*text, checkpoint.tokenizer.eod)]
    return np.tile(np.array(ids, dtype=np.int64), max(1, -(-least // len(ids)))), "built-in sentences"


def text_lines(checkpoint: NativeCheckpoint, tokens: np.ndarray) -> list[str]:
    """Return lines of text: the built-in sentences and those of the corpus.

    Args:
        checkpoint: A checkpoint of the run.
        tokens: Text tokens of the corpus, int64 [tokens].
    """
    documents = np.split(tokens, np.flatnonzero(tokens == checkpoint.tokenizer.eod) + 1)
    text = "\n".join(checkpoint.tokenizer.decode(document.tolist()) for document in documents)
    return [*SENTENCES, *(f" {text}" for text in SENTENCES), *filter(None, text.split("\n"))][:_LINES]


def tokenizer_agrees(checkpoint: NativeCheckpoint, folder: Path) -> bool:
    """Return whether transformers, which loads a tokenizer by the model type in config.json, gives the native ids.

    Args:
        checkpoint: The checkpoint that is exported.
        folder: Folder with config.json and the tokenizer's files.
    """
    try:
        lines = text_lines(checkpoint, corpus_tokens(checkpoint)[0])
        compare_tokenizers(checkpoint.tokenizer, checkpoint.pause_ids, folder, lines)
    except CheckpointError:
        return False
    return True


def compare_tokenizers(tokenizer: Tokenizer, pause_ids: range, folder: Path, lines: Sequence[str]) -> int:
    """Compare the native tokenizer with the folder's on lines of text, plain and with pauses appended.

    Args:
        tokenizer: The native tokenizer.
        pause_ids: The K pause ids.
        folder: The export.
        lines: Lines of text.

    Returns:
        Number of lines compared.

    Raises:
        CheckpointError: Ids differ. The message has the first such line, both lists, and the number of such lines.
    """
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    # Hugging Face encodes the name of a special token as that token; in a corpus it is text.
    names = [token.content for token in exported.added_tokens_decoder.values()]
    lines = [line for line in lines if not any(name in line for name in names)]
    expected = tokenizer.encode_batch(lines)
    actual = exported(lines, add_special_tokens=False, verbose=False)["input_ids"]
    different = [number for number in range(len(lines)) if list(expected[number]) != list(actual[number])]
    if different:
        first = different[0]
        raise CheckpointError(
            f"the converted tokenizer produces different ids for {len(different)} of {len(lines)} lines, for example "
            f"{lines[first][:200]!r}: expected {list(expected[first])[:40]}, got {list(actual[first])[:40]}"
        )
    whole, alone = exported("a")["input_ids"], exported("a", add_special_tokens=False)["input_ids"]
    if (leading := ids_before(whole, alone)) != tokenizer.leading:
        raise CheckpointError(f"before a text: expected the ids {tokenizer.leading}, got {leading}")
    pauses = list(pause_ids)
    text = exported.convert_ids_to_tokens(pauses)
    for line, ids in zip(lines[:10], expected[:10], strict=True):
        with_pauses = exported(line + "".join(text) + text[0] * 2, add_special_tokens=False, verbose=False)["input_ids"]
        if with_pauses != [*ids, *pauses, pauses[0], pauses[0]]:
            raise CheckpointError(
                f"pauses after {line[:80]!r}: expected the ids {pauses} after its own, got {with_pauses[-40:]}"
            )
    if exported.eos_token_id != tokenizer.eod:
        raise CheckpointError(f"end of sequence: expected id {tokenizer.eod}, got {exported.eos_token_id}")
    return len(lines)
