"""Whether ids that others wrote are those of a tokenizer: a sample of documents is decoded and encoded again.

The right tokenizer gives the ids back, but for some special tokens. A wrong one makes other text of them and cuts that
text otherwise, about as often as it does with its own ids in an arbitrary order; that is measured too.
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
"""Measured with vocabularies of 500 to 50,000: right ones gave back 0.94 to 1.00 of the runs, wrong ones 0.004 to 0.88;
wrong unigram models of text of one kind up to 1.00, as they did by chance."""

_BY_CHANCE = 0.95
SAMPLED = 200
_TOKENS = 1000
_RUN = 16


@dataclass(frozen=True)
class SampledDocument:
    """A document's number, its first tokens int64 [<= 1000], and its last token."""

    number: int
    ids: np.ndarray
    last: int


@dataclass(frozen=True)
class Agreement:
    """What comes back of a sample.

    Attributes:
        share: of the runs of 16 ids.
        by_chance: the same of these ids in an arbitrary order.
        documents: of the sample.
        text: how the first of them begins.
    """

    share: float
    by_chance: float
    documents: int
    text: str

    @property
    def tells(self) -> bool:
        """Whether another tokenizer's ids would have been noticed: not where nearly everything comes back anyway."""
        return self.by_chance < _BY_CHANCE

    @property
    def needed(self) -> float:
        """The share from which on the ids are the tokenizer's: half of what chance does not give back, too."""
        return max(MIN_AGREEMENT, (1 + self.by_chance) / 2) if self.tells else MIN_AGREEMENT


def sample_documents(prefix: str | Path, header: IndexHeader) -> list[SampledDocument]:
    """At most 200 documents, evenly spaced, leaving out those without tokens; the entries of the index were checked."""
    found = []
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
    """How much of a sample comes back.

    Args:
        tokenizer: the one that the ids are said to be of.
        sample: ids that are in its vocabulary.
    """
    known: dict[int, bool] = {}
    texts = []
    for document in sample:
        # Special tokens are not text: they are put there by an option, or by a literal "</s>".
        ids = [i for i in document.ids.tolist() if known.setdefault(i, tokenizer.reachable(i))]
        texts.append(ids)
    shuffled = np.random.default_rng(0).permutation(np.concatenate([*map(np.array, texts), []]).astype(np.int64))
    cuts = np.cumsum([len(ids) for ids in texts])[:-1]
    return Agreement(
        share=_given_back(tokenizer, texts),
        by_chance=_given_back(tokenizer, [part.tolist() for part in np.split(shuffled, cuts)]),
        documents=len(sample),
        text=tokenizer.decode(next((ids for ids in texts if ids), [])[:60]),
    )


def most_common_end(sample: Sequence[SampledDocument]) -> tuple[int, float]:
    """The id that most documents end with, and their share."""
    token_id, count = Counter(document.last for document in sample).most_common(1)[0]
    return token_id, count / len(sample)


def _given_back(tokenizer: Tokenizer, texts: Sequence[list[int]]) -> float:
    """Share of the runs of ids that are there again, of all documents together."""
    same = total = 0
    for ids, again in zip(texts, tokenizer.encode_batch([tokenizer.decode(ids) for ids in texts]), strict=True):
        run = max(1, min(_RUN, len(ids)))
        before, after = _runs(ids, run), _runs(again, run)
        same += (before & after).total()
        total += max(before.total(), after.total())
    return same / total if total else 1.0


def _runs(ids: list[int], length: int) -> Counter:
    return Counter(tuple(ids[start : start + length]) for start in range(len(ids) - length + 1))


def _spaced(lengths: Iterator[np.ndarray], step: int) -> Iterator[tuple[int, int, int]]:
    """Number, first token and length of every `step`-th document."""
    begun = position = 0
    for chunk in lengths:
        starts = position + np.cumsum(chunk, dtype=np.int64) - chunk
        for at in range(-begun % step, len(chunk), step):
            yield begun + at, int(starts[at]), int(chunk[at])
        begun, position = begun + len(chunk), position + int(chunk.sum(dtype=np.int64))
