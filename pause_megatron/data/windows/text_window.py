"""What a placement policy sees of a window, and the two protocols of policies. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

ONE_DOCUMENT = np.zeros(1, dtype=np.int64)
"""The offsets of a window that holds one document."""
ONE_DOCUMENT.flags.writeable = False


class TokenTexts(Protocol):
    """The texts of token ids: a table that is made at its first use, once in a process."""

    def __len__(self) -> int: ...

    def __getitem__(self, token: int) -> str:
        """Return the text of a token, with its leading blank; "" for EOD, pauses and other special tokens."""
        ...

    def matches(self, pattern: str) -> np.ndarray:
        """Return which tokens' texts contain a match of a regular expression.

        Args:
            pattern: The regular expression.

        Returns:
            One value for each id and a last one, False, for ids that are outside the table, bool [ids + 1].
        """
        ...


@dataclass(slots=True, eq=False)  # frozen would take 1 us more for each window
class TextWindow:
    """The text of a window before pauses are inserted, and what is known about it.

    Attributes:
        text: The window's text tokens, with any padding at its end, int64 [T], read-only.
        count: Places to choose: M, or ceil(M / run) with runs of pauses.
        rate: `pause.rate` / `pause.run`: places, as a fraction of the window.
        side: Values of `data.side` of these tokens [T], nan at padding, read-only; in an answer those of `task.scores`.
            None without them.
        documents: Offsets in `text` at which documents begin, ascending, the first one 0, int64. In a corpus they are
            those of its index, in a stream those after an EOD. They are the same where each document ends with EOD,
            and has no other one.
        sample: Sample number, 0 or more.
        dataset: Name of the corpus: its prefix without the folder; "stream" for data.source.
        split: Name of the split: train, valid or test.
        texts: Texts of the ids; None where there is no tokenizer.
    """

    text: np.ndarray
    count: int
    rate: float = 0.0
    side: np.ndarray | None = None
    documents: np.ndarray = field(default_factory=lambda: ONE_DOCUMENT)
    sample: int = 0
    dataset: str = ""
    split: str = ""
    texts: TokenTexts | None = None


@runtime_checkable
class PlacementPolicy(Protocol):
    """A function that chooses the text tokens that pauses follow, from their ids only.

    Any callable of this shape is a policy. `pause.placement=module:attribute` uses your own.
    """

    def __call__(self, text: np.ndarray, count: int, rate: float, rng: np.random.Generator) -> np.ndarray:
        """Return the gaps of one window.

        Args:
            text: The window's text tokens, with any padding at its end, int64 [T], read-only.
            count: M, the pauses to insert; with `pause.run`, the runs. In an `exact` window exactly this many gaps must
                be returned, in a `trim` window any number.
            rate: `pause.rate` / `pause.run`.
            rng: The generator of this sample. A draw from anything else makes samples irreproducible.

        Returns:
            Gaps in 1..T, integers, in any order. A gap given twice gets two pauses, or two runs.
        """
        ...


@runtime_checkable
class WindowPolicy(Protocol):
    """An object that chooses the text tokens that pauses follow, from all that is known about their window.

    `pause.placement=module:attribute` may name such an object, or its class, which is made without arguments.
    """

    def place(self, window: TextWindow, rng: np.random.Generator) -> np.ndarray:
        """Return the gaps of one window, as a PlacementPolicy does.

        Args:
            window: The window's text and what is known about it.
            rng: The generator of this sample. A draw from anything else makes samples irreproducible.

        Returns:
            Gaps in 1..T, integers, in any order; in an `exact` window `window.count` of them.
        """
        ...
