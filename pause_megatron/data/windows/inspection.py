"""What is in a prepared corpus, and what its windows look like with pauses in."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pause_megatron.config.schema import PauseSection
from pause_megatron.data.corpus.corpus import Corpus
from pause_megatron.data.corpus.index_file import read_lengths
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.windows.build import build_datasets
from pause_megatron.data.windows.dataset import PauseGPTDataset
from pause_megatron.data.windows.pause import POLICIES, PauseInjector, PausePlan
from pause_megatron.errors import ConfigError

RUN_LENGTHS = 5
"""Runs of this length or more are counted together."""

_LONGEST = 1 << 20
_FERTILITY_DOCUMENTS = 500


@dataclass(frozen=True)
class Lengths:
    """Tokens of a document, its EOD included.

    Attributes:
        shortest, mean, longest: over all documents.
        quantiles: by percent: 5, 25, 50, 75, 95, 99; those above 2**20 are given as 2**20.
        edges: [B + 1], powers of two.
        counts: [B], documents with edges[b] <= length < edges[b + 1].
    """

    shortest: int
    mean: float
    longest: int
    quantiles: dict[int, int]
    edges: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Fertility:
    """How finely the tokenizer cuts text. EODs do not count.

    Attributes:
        per_byte: tokens a byte of UTF-8, over the whole corpus; where its text is not known, over `documents`.
        per_character, per_word: over `documents` of it, evenly spaced; a word is what white space parts.
    """

    per_byte: float
    per_character: float
    per_word: float
    documents: int


@dataclass(frozen=True)
class PolicyStatistics:
    """Pauses that a placement policy gives to windows of N input tokens.

    Attributes:
        placement, window: as in pause.placement and pause.window.
        rate: pauses among the input tokens.
        fewest, most: pauses of a window.
        runs: share of the runs of 1, 2, ..., RUN_LENGTHS or more pauses.
        longest_run: pauses.
    """

    placement: str
    window: str
    rate: float
    fewest: int
    most: int
    runs: list[float]
    longest_run: int


@dataclass(frozen=True)
class WindowView:
    """One window as text, its pauses in angle brackets, and what it counts."""

    sample: int
    text: str
    tokens: int
    pauses: int
    targets: int
    targets_after_pause: int


def document_lengths(corpus: Corpus) -> Lengths:
    """Lengths of all documents, from the index, in constant memory."""
    histogram = np.zeros(_LONGEST + 1, dtype=np.int64)
    shortest, longest = np.iinfo(np.int32).max, 0
    for chunk in read_lengths(path_of(corpus.prefix, "idx"), corpus.manifest.counts.documents):
        histogram += np.bincount(np.minimum(chunk, _LONGEST), minlength=_LONGEST + 1)
        shortest, longest = min(shortest, int(chunk.min())), max(longest, int(chunk.max()))
    documents = int(histogram.sum())
    ranks = histogram.cumsum()
    edges = [1 << power for power in range(max(shortest.bit_length() - 1, 0), longest.bit_length() + 1)]
    edges = [0, *edges] if shortest == 0 else edges  # others write documents without tokens, too
    below = [0 if edge == 0 else int(ranks[min(edge, _LONGEST + 1) - 1]) for edge in edges]
    return Lengths(
        shortest=shortest,
        mean=corpus.manifest.counts.tokens / documents,
        longest=longest,
        quantiles={q: int(ranks.searchsorted(q / 100 * documents)) for q in (5, 25, 50, 75, 95, 99)},
        edges=edges,
        counts=np.diff(below).tolist(),
    )


def fertility(corpus: Corpus) -> Fertility:
    """Tokens per byte, character and word."""
    manifest, counts = corpus.manifest, corpus.manifest.counts
    starts = np.cumsum([0, *_first_lengths(corpus)])
    tokens = np.memmap(path_of(corpus.prefix, "bin"), dtype=manifest.dtype, mode="r")
    sampled = range(0, len(starts) - 1, max(1, (len(starts) - 1) // _FERTILITY_DOCUMENTS))
    ids = characters = words = text_bytes = 0
    for number in sampled:
        document = [i for i in tokens[starts[number] : starts[number + 1]].tolist() if i != manifest.tokenizer.eod]
        text = corpus.tokenizer.decode(document)
        ids, characters, words = ids + len(document), characters + len(text), words + len(text.split())
        text_bytes += len(text.encode(errors="replace"))
    whole = counts.text_bytes is not None
    per_byte = (counts.tokens - manifest.eod_count) / max(counts.text_bytes, 1) if whole else ids / max(text_bytes, 1)
    return Fertility(
        per_byte=per_byte,
        per_character=ids / max(characters, 1),
        per_word=ids / max(words, 1),
        documents=len(sampled),
    )


def _first_lengths(corpus: Corpus) -> np.ndarray:
    """Lengths of the documents at the beginning, at most 2**20 of them."""
    return next(iter(read_lengths(path_of(corpus.prefix, "idx"), corpus.manifest.counts.documents)))


class Windows:
    """The windows of a corpus, all of it as the train split, shuffled as a run with this seed and as many samples does.

    Args:
        corpus: opened.
        pause: the pause options.
        sequence_length: N, input tokens of a window.
        seed: of the order.
        samples: windows that are looked at.
    """

    def __init__(self, corpus: Corpus, pause: PauseSection, *, sequence_length: int, seed: int, samples: int) -> None:
        self._corpus, self._pause, self._samples = corpus, pause, samples
        self._sequence_length, self._seed = sequence_length, seed
        self._dataset = self._build(pause)

    def show(self, sample: int) -> WindowView:
        """One window."""
        found = self._dataset[sample]
        tokens, loss_mask = found["tokens"].numpy(), found["loss_mask"].numpy()
        ids = self._dataset.injector.pause_ids
        is_pause = (tokens >= ids.start) & (tokens < ids.stop)
        return WindowView(
            sample=sample,
            text=self._corpus.tokenizer.decode(tokens, eod_text="<eod>\n"),
            tokens=tokens.size,
            pauses=int(is_pause.sum()),
            targets=int(loss_mask.sum()),
            targets_after_pause=int(loss_mask[is_pause].sum()),
        )

    def policies(self, further: Sequence[str] = ()) -> list[PolicyStatistics]:
        """Statistics of every policy that ships and of `further` ones, each in the window that it fits.

        A policy that needs another kind of window than pause.window is shown in that one.
        """
        found = []
        datasets = {self._pause.window: self._dataset}
        for placement in (*POLICIES, *(name for name in further if name not in POLICIES)):
            for window in dict.fromkeys((self._pause.window, "trim")):
                try:
                    plan = dataclasses.replace(self._plan(window), placement=placement)
                except ConfigError:
                    continue  # bernoulli in an exact window, or no room to keep isolated pauses apart
                if window not in datasets:
                    datasets[window] = self._build(self._pause.model_copy(update={"window": window}))
                found.append(self._statistics(plan, datasets[window]))
                break
        return found

    def _plan(self, window: str) -> PausePlan:
        pause = self._pause
        return PausePlan(self._sequence_length, pause.rate, window, "uniform", pause.seed)

    def _build(self, pause: PauseSection) -> PauseGPTDataset:
        # The indices are used once; nothing is left beside the corpus.
        with tempfile.TemporaryDirectory() as cache:
            return build_datasets(
                [self._corpus.prefix],
                split="1,0,0",
                sequence_length=self._sequence_length,
                tokenizer=self._corpus.tokenizer,
                pause=pause,
                seed=self._seed,
                train_samples=self._samples,
                valid_samples=0,
                cache=cache,
            ).train

    def _statistics(self, plan: PausePlan, dataset: PauseGPTDataset) -> PolicyStatistics:
        own = dataset.injector
        injector = PauseInjector(plan, own.pause_ids, own.dataset, own.split)
        pauses, lengths = [], []
        for sample in range(self._samples):
            is_text = injector(dataset.window_text(sample), sample).is_text[:-1]
            pauses.append(int((~is_text).sum()))
            # Runs end where text follows: differences of the number of text tokens before each pause.
            _, run = np.unique(is_text.cumsum()[~is_text], return_counts=True)
            lengths.append(run)
        runs = np.concatenate(lengths)
        shares = np.bincount(np.minimum(runs, RUN_LENGTHS), minlength=RUN_LENGTHS + 1)[1:] / max(runs.size, 1)
        return PolicyStatistics(
            placement=plan.placement,
            window=plan.window,
            rate=sum(pauses) / (plan.sequence_length * len(pauses)),
            fewest=min(pauses),
            most=max(pauses),
            runs=shares.tolist(),
            longest_run=int(runs.max(initial=0)),
        )
