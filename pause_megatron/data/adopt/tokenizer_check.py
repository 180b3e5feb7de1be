"""A test of whether ids are those of a tokenizer: a sample of documents is decoded and encoded again.

The right tokenizer reproduces the ids, except for some special tokens. A wrong one decodes them to other text and
splits it in another way. It reproduces about as many as of its own ids in random order, which is measured too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pause_megatron.data.corpus.index_file import IndexHeader, read_lengths
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.tokenizer.tokenizer import Tokenizer

MIN_AGREEMENT = 0.9
"""Measured with vocabularies of 500 to 50,000: right tokenizers reproduced 0.94 to 1.00 of the n-grams, wrong ones
0.004 to 0.88. Wrong unigram models reproduced up to 1.00, and as much by chance."""

_BY_CHANCE = 0.95
SAMPLED = 200
_TOKENS = 1000
_NGRAM = 16


@dataclass(frozen=True)
class SampledDocument:
    """A document of the sample.

    Attributes:
        number: Number of the document, from 0.
        ids: Its first ids, int64 [at most 1000].
        last: Its last id.
    """

    number: int
    ids: np.ndarray
    last: int


@dataclass(frozen=True)
class Agreement:
    """How much of a sample decoding and encoding reproduces.

    Attributes:
        share: Fraction of the n-grams of 16 ids that are reproduced.
        by_chance: The same fraction for these ids in random order.
        documents: Number of sampled documents.
        text: The beginning of the first document.
    """

    share: float
    by_chance: float
    documents: int
    text: str

    @property
    def conclusive(self) -> bool:
        """Whether another tokenizer's ids would be detected: not if nearly all random ids are reproduced."""
        return self.by_chance < _BY_CHANCE

    @property
    def needed(self) -> float:
        """The minimal share: `MIN_AGREEMENT`, and half of what chance does not reproduce."""
        return max(MIN_AGREEMENT, (1 + self.by_chance) / 2) if self.conclusive else MIN_AGREEMENT


def sample_documents(prefix: str | Path, header: IndexHeader) -> list[SampledDocument]:
    """Return at most 200 evenly spaced documents that have tokens.

    Args:
        prefix: PREFIX of the corpus.
        header: Header of its `.idx`, whose entries have been checked.
    """
    found: list[SampledDocument] = []
    step = max(1, header.documents // SAMPLED)
    itemsize = np.dtype(header.dtype).itemsize

    def read(start: int, count: int) -> np.ndarray:
        file.seek(start * itemsize)
        return np.fromfile(file, dtype=header.dtype, count=count).astype(np.int64)

    with open(path_of(prefix, "bin"), "rb") as file:
        for number, start, length in _spaced(read_lengths(path_of(prefix, "idx"), header.documents), step):
            if length and len(found) < SAMPLED:
                ids = read(start, min(length, _TOKENS))
                found.append(SampledDocument(number, ids, int(read(start + length - 1, 1)[0])))
    return found


def agreement_of(tokenizer: Tokenizer, sample: Sequence[SampledDocument]) -> Agreement:
    """Return how much of a sample decoding and encoding reproduces.

    Args:
        tokenizer: The assumed tokenizer.
        sample: Documents whose ids are in its vocabulary.
    """
    known: dict[int, bool] = {}
    texts = []
    for document in sample:
        # Special tokens are not text: an option adds them, or Megatron-LM encodes a literal "</s>" as one.
        ids = [i for i in document.ids.tolist() if known.setdefault(i, tokenizer.reachable(i))]
        texts.append(ids)
    shuffled = np.random.default_rng(0).permutation(np.concatenate([*map(np.array, texts), []]).astype(np.int64))
    cuts = np.cumsum([len(ids) for ids in texts])[:-1]
    return Agreement(
        share=_reproduced(tokenizer, texts),
        by_chance=_reproduced(tokenizer, [part.tolist() for part in np.split(shuffled, cuts)]),
        documents=len(sample),
        text=tokenizer.decode(next((ids for ids in texts if ids), [])[:60]),
    )


def most_common_end(sample: Sequence[SampledDocument]) -> tuple[int, float]:
    """Return the id that most documents end with, and the fraction of these documents."""
    token_id, count = Counter(document.last for document in sample).most_common(1)[0]
    return token_id, count / len(sample)


def _reproduced(tokenizer: Tokenizer, texts: Sequence[list[int]]) -> float:
    """Return the fraction of n-grams of ids that are reproduced, over all documents."""
    same = total = 0
    for ids, again in zip(texts, tokenizer.encode_batch([tokenizer.decode(ids) for ids in texts]), strict=True):
        size = max(1, min(_NGRAM, len(ids)))
        before, after = _ngrams(ids, size), _ngrams(again, size)
        same += (before & after).total()
        total += max(before.total(), after.total())
    return same / total if total else 1.0


def _ngrams(ids: list[int], length: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(ids[start : start + length]) for start in range(len(ids) - length + 1))


def _spaced(lengths: Iterator[np.ndarray], step: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, first token and length of every `step`-th document."""
    begun = position = 0
    for chunk in lengths:
        starts = position + np.cumsum(chunk, dtype=np.int64) - chunk
        for at in range(-begun % step, len(chunk), step):
            yield begun + at, int(starts[at]), int(chunk[at])
        begun, position = begun + len(chunk), position + int(chunk.sum(dtype=np.int64))
