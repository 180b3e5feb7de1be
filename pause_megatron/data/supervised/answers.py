"""Pauses within answers: their gaps, by a placement policy, for each example and epoch.

    A     tokens of an answer without its end-of-document token: the text that a policy sees.
    M_a   pauses within an answer, in whole runs: pause.run x round(finetune.answer_rate x A / pause.run), for a policy
          that takes a number of pauses; pause.run x A for `every`.
    gap   g in 1..A: directly after the g-th token of the answer. Pauses before its first token are those of the prompt:
          `scored` never chooses that token, however high its value, nor EOD, which is not part of the text.

Pauses are inputs and never targets. What follows a run of them is predicted from its last pause. A draw is a function
of (seed, task, epoch, example number): it does not depend on packing, ranks, or the step of a resume.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pause_megatron.config.pauses import BY_PATTERN
from pause_megatron.data.windows.placement import Placement
from pause_megatron.data.windows.policies import POLICIES
from pause_megatron.data.windows.text_window import TextWindow, TokenTexts
from pause_megatron.errors import ConfigError
from pause_megatron.seeds import philox_key

NO_GAPS = np.zeros(0, dtype=np.int64)
"""The gaps of an answer without pauses."""

_OF_ANY_NUMBER = ("bernoulli",)


@dataclass(frozen=True)
class AnswerPauses:
    """The placement of pauses within answers.

    Attributes:
        placement: A name in POLICIES, or 'module:attribute': `finetune.answer_placement`.
        rate: Pauses, as a fraction of the tokens of an answer: `finetune.answer_rate`.
        run: Consecutive pauses at each place: `pause.run`.
        pattern: Regular expression of `after` and `before`: `pause.pattern`; other policies do not use it.
        texts: Texts of the ids, for policies that look at them.

    Raises:
        ConfigError: There is no such policy.
    """

    placement: str
    rate: float
    run: int = 1
    pattern: str | None = None
    texts: TokenTexts | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        try:
            _ = self._placement
        except ConfigError as error:
            raise _renamed(error) from error

    @cached_property
    def _placement(self) -> Placement:
        return Placement(self.placement, self.run, self.pattern if self.placement in BY_PATTERN else None)

    @property
    def decided_by(self) -> str:
        """The key that decides the number of pauses."""
        return "pause.run" if self.placement == "every" else "finetune.answer_rate"

    def most(self, size: int) -> int | None:
        """Return the largest number of pauses within an answer; None where a policy of the user's decides.

        Args:
            size: A, its tokens without EOD.
        """
        if self.placement not in POLICIES:
            return None
        return size * self.run if self.placement in _OF_ANY_NUMBER else self._count(size)

    def gaps(self, answer: np.ndarray, *address: object, number: int, values: np.ndarray | None = None) -> np.ndarray:
        """Return the gaps of an answer.

        Args:
            answer: Its ids without EOD, [A].
            *address: Seed, task and epoch.
            number: Number of the example.
            values: Values of these tokens, of `task.scores` [A]; None without them.

        Returns:
            Gaps in 1..A, int64, ascending. A gap that is there r times has r pauses.

        Raises:
            ConfigError: A policy of the user's returned something else.
        """
        if not answer.size:
            return NO_GAPS
        text = answer.astype(np.int64)
        text.flags.writeable = False
        _, task, _ = address
        window = TextWindow(
            *(text, self._count(text.size), self.rate, values),
            sample=number,
            dataset=str(task),
            split="answers",
            texts=self.texts,
        )
        key = np.array(philox_key(*address, "answers"), dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, number, 0)))
        try:
            return self._placement.gaps(window, rng, exact=False)
        except ConfigError as error:
            raise _renamed(error) from error

    def _count(self, size: int) -> int:
        places = size if self.placement == "every" else round(self.rate * size / self.run)
        return places * self.run


def _renamed(error: ConfigError) -> ConfigError:
    """Return an error about a policy with the key of answers."""
    return ConfigError(str(error).replace("pause.placement", "finetune.answer_placement"))
