"""Statistics of a prepared corpus and of its windows with pauses: lengths, fertility, placement policies."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pause_megatron.config.pauses import BY_PATTERN
from pause_megatron.config.schema import PauseSection
from pause_megatron.data.corpus.corpus import Corpus
from pause_megatron.data.corpus.index_file import read_lengths
from pause_megatron.data.corpus.manifest import path_of
from pause_megatron.data.windows.build import DatasetOptions, build_datasets
from pause_megatron.data.windows.dataset import PauseGPTDataset
from pause_megatron.data.windows.pause import POLICIES, PauseInjector, PausePlan
from pause_megatron.errors import ConfigError

RUN_LENGTHS = 5
"""Runs of this many pauses or more are counted together."""

_LONGEST = 1 << 20
_FERTILITY_DOCUMENTS = 500


@dataclass(frozen=True)
class Lengths:
    """Document lengths in tokens, EOD included.

    Attributes:
        shortest: The least length.
        mean: The mean length.
        longest: The greatest length.
        quantiles: Lengths by percent: 5, 25, 50, 75, 95, 99; at most 2**20.
        edges: Powers of two, [B + 1].
        counts: Documents with edges[b] <= length < edges[b + 1], [B].
    """

    shortest: int
    mean: float
    longest: int
    quantiles: dict[int, int]
    edges: list[int]
    counts: list[int]


@dataclass(frozen=True)
class Fertility:
    """Fertility of the tokenizer on a corpus, without EOD.

    Attributes:
        per_byte: Tokens per byte of UTF-8, over the whole corpus; for an adopted corpus, over the sampled documents.
        per_character: Tokens per character, over the sampled documents.
        per_word: Tokens per word, over the sampled documents. White space separates words.
        documents: Number of sampled documents, evenly spaced.
    """

    per_byte: float
    per_character: float
    per_word: float
    documents: int


@dataclass(frozen=True)
class PolicyStatistics:
    """Pauses of a placement policy in windows of N input tokens.

    Attributes:
        placement: The policy, as in `pause.placement`.
        window: The kind of window, as in `pause.window`.
        rate: Fraction of pauses among the input tokens.
        fewest: The least number of pauses in a window.
        most: The greatest number of pauses in a window.
        runs: Fractions of the runs that have 1, 2, ..., RUN_LENGTHS or more pauses.
        longest_run: Pauses of the longest run.
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
    """A window as text, with its counts.

    Attributes:
        sample: Sample number.
        text: The decoded window. Pauses are shown as <pause>, EOD as <eod>.
        tokens: Input tokens.
        pauses: Pauses among them.
        targets: Supervised positions.
        targets_after_pause: Supervised positions whose input token is a pause.
    """

    sample: int
    text: str
    tokens: int
    pauses: int
    targets: int
    targets_after_pause: int


def document_lengths(corpus: Corpus) -> Lengths:
    """Return the statistics of document lengths, from the index, in constant memory."""
    histogram = np.zeros(_LONGEST + 1, dtype=np.int64)
    shortest, longest = np.iinfo(np.int32).max, 0
    for chunk in read_lengths(path_of(corpus.prefix, "idx"), corpus.manifest.counts.documents):
        histogram += np.bincount(np.minimum(chunk, _LONGEST), minlength=_LONGEST + 1)
        shortest, longest = min(shortest, int(chunk.min())), max(longest, int(chunk.max()))
    documents = int(histogram.sum())
    ranks = histogram.cumsum()
    edges = [1 << power for power in range(max(shortest.bit_length() - 1, 0), longest.bit_length() + 1)]
    edges = [0, *edges] if shortest == 0 else edges  # an adopted corpus may have documents without tokens
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
    """Return the tokens per byte, character and word of a corpus."""
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
    if counts.text_bytes is None:
        per_byte = ids / max(text_bytes, 1)
    else:
        per_byte = (counts.tokens - manifest.eod_count) / max(counts.text_bytes, 1)
    return Fertility(
        per_byte=per_byte,
        per_character=ids / max(characters, 1),
        per_word=ids / max(words, 1),
        documents=len(sampled),
    )


def _first_lengths(corpus: Corpus) -> np.ndarray:
    """Return the lengths of the first documents, at most 2**20 of them."""
    return next(iter(read_lengths(path_of(corpus.prefix, "idx"), corpus.manifest.counts.documents)))


class Windows:
    """The windows that a run would train on, with the whole corpus as its train split.

    Args:
        corpus: The corpus.
        pause: The pause section of the configuration.
        sequence_length: N, input tokens of a window.
        seed: Seed of the sample order.
        samples: Number of windows.
        side: `data.side`, the name of a side array.
    """

    def __init__(
        self,
        corpus: Corpus,
        pause: PauseSection,
        *,
        sequence_length: int,
        seed: int,
        samples: int,
        side: str | None = None,
    ) -> None:
        self._corpus, self._pause, self._samples, self._side = corpus, pause, samples, side
        self._sequence_length, self._seed = sequence_length, seed
        self._dataset = self._build(pause)
        plan = self._dataset.injector.plan
        self._datasets = {self._key(plan): self._dataset}

    def show(self, sample: int) -> WindowView:
        """Return one window as text, with its counts.

        Args:
            sample: Sample number, 0 or more.
        """
        item = self._dataset[sample]
        tokens, loss_mask = item["tokens"].numpy(), item["loss_mask"].numpy()
        ids = self._dataset.injector.pause_ids
        is_pause = (tokens >= ids.start) & (tokens < ids.stop)
        return WindowView(
            sample=sample,
            text=self._corpus.tokenizer.decode(tokens.tolist(), eod_text="<eod>\n"),
            tokens=tokens.size,
            pauses=int(is_pause.sum()),
            targets=int(loss_mask.sum()),
            targets_after_pause=int(loss_mask[is_pause].sum()),
        )

    def policies(self, further: Sequence[str] = ()) -> list[PolicyStatistics]:
        """Return the statistics of the policies that ship, and of others, each with `pause.run`.

        A policy that does not fit `pause.window` is measured in windows of the other kind. `scored` needs a side array.

        Args:
            further: Further policies, as 'module:attribute'.
        """
        statistics = []
        for placement in (*POLICIES, *(name for name in further if name not in POLICIES)):
            if placement == "scored" and self._side is None:
                continue
            for window in dict.fromkeys((self._pause.window, "trim", "exact")):
                try:
                    plan = self._plan(placement, window)
                except ConfigError:
                    continue  # bernoulli in an exact window, `every` in a trim one, or too many isolated pauses
                statistics.append(self._statistics(plan, self._with_text_of(plan)))
                break
        return statistics

    def _plan(self, placement: str, window: str) -> PausePlan:
        pattern = self._pause.pattern if placement in BY_PATTERN else None
        pause = self._pause.model_copy(update={"window": window, "placement": placement, "pattern": pattern})
        return PausePlan.of(pause, self._sequence_length)

    def _with_text_of(self, plan: PausePlan) -> PauseGPTDataset:
        """Return windows with the text of a plan; policies with equally much text share them."""
        key = self._key(plan)
        if key not in self._datasets:
            changes = {"window": plan.window, "placement": plan.placement, "pattern": plan.pattern}
            self._datasets[key] = self._build(self._pause.model_copy(update=changes))
        return self._datasets[key]

    def _key(self, plan: PausePlan) -> tuple[int, bool]:
        """Return what the datasets of plans differ in: the length of their text, and whether they have a side array."""
        return plan.text_length, plan.policy.sees_windows and self._side_for(plan.placement) is not None

    def _side_for(self, placement: str) -> str | None:
        return self._side if placement == "scored" or ":" in placement else None

    def _build(self, pause: PauseSection) -> PauseGPTDataset:
        # The indices are used once, so they go into a temporary folder.
        with tempfile.TemporaryDirectory() as cache:
            datasets = build_datasets(
                DatasetOptions(
                    [self._corpus.prefix],
                    split="1,0,0",
                    sequence_length=self._sequence_length,
                    tokenizer=self._corpus.tokenizer,
                    pause=pause,
                    seed=self._seed,
                    train_samples=self._samples,
                    valid_samples=0,
                    cache=cache,
                    side=self._side_for(pause.placement),
                )
            )
        if not isinstance(datasets.train, PauseGPTDataset):
            raise TypeError(f"expected the dataset of one corpus, got a {type(datasets.train).__name__}")
        return datasets.train

    def _statistics(self, plan: PausePlan, dataset: PauseGPTDataset) -> PolicyStatistics:
        own = dataset.injector
        injector = PauseInjector(plan, own.pause_ids, own.dataset, own.split, own.texts)
        pauses, lengths = [], []
        for sample in range(self._samples):
            is_text = dataset.window(injector, sample).is_text[:-1]
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
            longest_run=int(np.max(runs, initial=0)),
        )
