"""Placement of pauses in a window of text, and their injection. Pure numpy: no model, no engine, no torch.

Notation (Goyal et al., "Think before you speak", ICLR 2024, section 3; `pause.*` are this project's options):

    N     data.sequence_length: input tokens of a window. A window is drawn with one token more, so that inputs and
          targets both have N.
    M     round(rate * N): pauses to insert. `every` derives it from the run (`config.pauses.PauseCounts`).
    T     text tokens drawn. `exact`: N + 1 - M, so that text and pauses fill the window and no text is lost.
          `trim` (the paper's): N + 1; the longer sequence is cut back to N + 1 after insertion.
    gap   g in 1..T: the position directly after the g-th text token. There is none before the first token: a window
          always starts with text, so that every `exact` window has T - 1 supervised targets.

Random draws are keyed by their address: the gaps of a sample are a function of (pause seed, dataset, split, sample
number). They do not depend on ranks, workers, micro-batches or the step of a resume.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pause_megatron.config.pauses import BY_PATTERN, PauseCounts, placement_conflict
from pause_megatron.config.schema import PauseSection
from pause_megatron.data.windows.placement import Placement, resolve_policy
from pause_megatron.data.windows.policies import POLICIES
from pause_megatron.data.windows.text_window import ONE_DOCUMENT, PlacementPolicy, TextWindow, TokenTexts, WindowPolicy
from pause_megatron.errors import ConfigError
from pause_megatron.seeds import philox_key

__all__ = [
    "LOCATIONS",
    "POLICIES",
    "PauseInjector",
    "PausePlan",
    "PlacementPolicy",
    "TextWindow",
    "Window",
    "WindowPolicy",
    "add_pauses",
    "inject",
    "resolve_policy",
]


class Window(NamedTuple):
    """A window with its pauses.

    Attributes:
        tokens: Text and pause ids, int64 [L].
        places: Indices of the pauses in `tokens`, int64 [number of pauses], ascending; never 0.
    """

    tokens: np.ndarray
    places: np.ndarray

    @property
    def is_text(self) -> np.ndarray:
        """Mask of the text tokens, bool [L]: False at pauses."""
        is_text = np.empty(self.tokens.size, dtype=bool)
        is_text.fill(True)  # np.ones takes 1 us more
        is_text[self.places] = False
        return is_text


def inject(text: np.ndarray, gaps: np.ndarray, pause_ids: range, length: int | None = None) -> Window:
    """Insert a pause into each gap. Without its pauses, the window is the text, in order.

    Args:
        text: Text ids, int64 [T].
        gaps: Gaps in 1..T, integers [M], in any order.
        pause_ids: The K pause ids, used in turn within each run of pauses, from the first on.
        length: Tokens to cut the window to (the paper's trim), at most T + M. None: all.

    Returns:
        A window of `length` or T + M tokens.
    """
    gaps = np.sort(gaps)
    index = np.arange(gaps.size)
    places = gaps + index
    if length is None:
        length = text.size + gaps.size
    elif length < text.size + gaps.size:
        kept = int(places.searchsorted(length))
        places, text = places[:kept], text[: length - kept]
    window = Window(np.empty(length, dtype=np.int64), places)
    window.tokens[window.is_text] = text
    if len(pause_ids) == 1:
        window.tokens[places] = pause_ids.start
    else:
        index_in_run = index - gaps.searchsorted(gaps)
        window.tokens[places] = pause_ids.start + index_in_run[: places.size] % len(pause_ids)
    return window


LOCATIONS = ("append", "prepend")
"""Locations of the pauses of a prompt: after it, or before it."""


def add_pauses(ids: np.ndarray, count: int, pause_ids: range, *, location: str, kept: int = 0) -> np.ndarray:
    """Add M pauses to a prompt, for finetuning and inference (Goyal et al., sections 3.2 and 3.3).

    Args:
        ids: Ids of the prompt, int64 [tokens]; may be empty.
        count: M.
        pause_ids: The K pause ids, used in turn; or the one id of a filler.
        location: One of LOCATIONS.
        kept: Tokens at the beginning (a BOS) that prepended pauses follow.

    Returns:
        Ids of prompt and pauses, int64 [tokens + M].
    """
    # inject() inserts nothing before the first token, so a dummy token is put there and removed again.
    gap = 1 + (ids.size if location == "append" else kept)
    return inject(np.concatenate([[0], ids]), np.full(count, gap, dtype=np.int64), pause_ids).tokens[1:]


@dataclass(frozen=True)
class PausePlan:
    """The pause settings of a dataset, checked, with the numbers that follow from them for every window.

    Attributes:
        sequence_length: N, input tokens of a window.
        rate: Pauses inserted, as a fraction of N; 0 <= rate < 1.
        window: "exact" or "trim".
        placement: A name in POLICIES, or 'module:attribute'.
        seed: Seed of the placement.
        run: Consecutive pauses at each place that the policy chooses.
        pattern: Regular expression of `after` and `before`; None: punctuation.

    Raises:
        ConfigError: A value is out of its range, the policy does not exist or does not fit the window, or the window
            has too little room for the pauses.
    """

    sequence_length: int
    rate: float
    window: str = "exact"
    placement: str = "uniform"
    seed: int = 1234
    run: int = 1
    pattern: str | None = None

    @classmethod
    def of(cls, pause: PauseSection, sequence_length: int) -> PausePlan:
        """Return the plan of a configuration.

        Args:
            pause: The pause section.
            sequence_length: `data.sequence_length`.
        """
        pattern = pause.pattern if pause.placement in BY_PATTERN else None  # else it is that of answers
        return cls(sequence_length, pause.rate, pause.window, pause.placement, pause.seed, pause.run, pattern)

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ConfigError(f"pause.rate: expected a fraction, 0 <= rate < 1, got {self.rate}")
        if self.window not in ("exact", "trim"):
            raise ConfigError(f"pause.window: expected 'exact' or 'trim', got {self.window!r}")
        if self.seed < 0:
            raise ConfigError(f"pause.seed: expected 0 or more, got {self.seed}")
        _ = self.policy  # which checks its name, run and pattern
        if (conflict := placement_conflict(self.counts)) is not None:
            keys, expected = conflict
            values = {
                "pause.run": self.run,
                "data.sequence_length": self.sequence_length,
                "pause.rate": self.rate,
                "pause.window": self.window,
                "pause.placement": self.placement,
            }
            raise ConfigError(
                f"{keys[0]}: expected {expected}, got {', '.join(f'{key}={values[key]}' for key in keys)}"
            )

    @cached_property
    def counts(self) -> PauseCounts:
        """Pauses and text tokens of a window."""
        return PauseCounts(self.sequence_length, self.rate, self.window, self.placement, self.run)

    @cached_property
    def policy(self) -> Placement:
        """The policy with its runs."""
        return Placement(self.placement, self.run, self.pattern)

    @property
    def count(self) -> int:
        """M, pauses inserted before any trim (`round` is Python's: half to even)."""
        return self.counts.inserted

    @property
    def text_length(self) -> int:
        """T, text tokens drawn for a window."""
        return self.counts.text_length


_of_thread = threading.local()


class PauseInjector:
    """The pauses of one dataset and split, as a pure function of the sample number.

    Args:
        plan: The pause settings.
        pause_ids: The K pause ids.
        dataset: Name of the corpus: its prefix without the folder, so that a corpus can be moved.
        split: Name of the split: train, valid or test.
        texts: Texts of the ids, for policies that look at them. None: there is no tokenizer.
    """

    def __init__(
        self, plan: PausePlan, pause_ids: range, dataset: str, split: str, texts: TokenTexts | None = None
    ) -> None:
        self.plan = plan
        self.pause_ids = pause_ids
        self.dataset = dataset
        self.split = split
        self.texts = texts
        self._policy, self._count, self._exact = plan.policy, plan.count, plan.window == "exact"
        self._key = philox_key(plan.seed, dataset, split)

    def generator(self, sample: int) -> np.random.Generator:
        """Return the Philox generator of a sample: its key is (seed, dataset, split), its counter the sample number.

        The sample number is the third word of the counter, so that each sample has 2**128 blocks of its own. Each
        thread has one generator, whose state is set here: this takes 1 us, a new generator 9 us.

        Args:
            sample: Sample number, 0 or more.

        Returns:
            The generator of this thread. Its state is valid until the next call.
        """
        generator = getattr(_of_thread, "generator", None)
        if generator is None:
            generator = _of_thread.generator = np.random.Generator(np.random.Philox(key=0))
        generator.bit_generator.state = {
            "bit_generator": "Philox",
            "state": {"counter": (0, 0, sample, 0), "key": self._key},
            "buffer": (0, 0, 0, 0),
            "buffer_pos": 4,  # the buffer is empty: the next draw computes a block
            "has_uint32": 0,
            "uinteger": 0,
        }
        return generator

    @property
    def sees_windows(self) -> bool:
        """Whether the policy looks at more than the text, so that documents and side values are worth finding."""
        return self._policy.sees_windows and self._count > 0

    def gaps(
        self, text: np.ndarray, sample: int, *, side: np.ndarray | None = None, documents: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the checked gaps of a sample.

        Args:
            text: Text ids of the window, int64 [T].
            sample: Sample number, 0 or more.
            side: Side values of the text tokens [T], for policies that see windows.
            documents: Offsets at which documents begin, for policies that see windows; None: one document.

        Returns:
            Gaps in 1..T, int64 [number of pauses], ascending.

        Raises:
            ConfigError: The policy lacks something, or a user's policy returned something else. The message names it.
        """
        text = text.view()
        text.flags.writeable = False
        documents = ONE_DOCUMENT if documents is None else documents
        about = (side, documents, sample, self.dataset, self.split, self.texts)
        window = TextWindow(text, self._count, self.plan.rate, *about)
        return self._policy.gaps(window, self.generator(sample), exact=self._exact)

    def __call__(
        self, text: np.ndarray, sample: int, *, side: np.ndarray | None = None, documents: np.ndarray | None = None
    ) -> Window:
        """Return the window of a sample, N + 1 tokens.

        Args:
            text: Text ids, int64 [T], with T = plan.text_length.
            sample: Sample number, 0 or more.
            side: As for `gaps`.
            documents: As for `gaps`.
        """
        gaps = self.gaps(text, sample, side=side, documents=documents)
        return inject(text, gaps, self.pause_ids, self.plan.sequence_length + 1)
