"""Pauses within answers: their gaps, by a placement policy, for each example and epoch.

    A     tokens of an answer without its end-of-document token: the text that a policy sees.
    M_a   pauses within an answer: round(finetune.answer_rate x A), for a policy that takes a number of pauses.
    gap   g in 1..A: directly after the g-th token of the answer. Pauses before its first token are those of the prompt.

Pauses are inputs and never targets. What follows a run of them is predicted from its last pause. A draw is a function
of (seed, task, epoch, example number): it does not depend on packing, ranks, or the step of a resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pause_megatron.data.windows.pause import POLICIES, resolve_policy
from pause_megatron.errors import ConfigError
from pause_megatron.seeds import philox_key

NO_GAPS = np.zeros(0, dtype=np.int64)
"""The gaps of an answer without pauses."""

_FIXED = ("uniform", "isolated", "with_replacement", "interval")


@dataclass(frozen=True)
class AnswerPauses:
    """The placement of pauses within answers.

    Attributes:
        placement: A name in POLICIES, or 'module:attribute': `finetune.answer_placement`.
        rate: Pauses, as a fraction of the tokens of an answer: `finetune.answer_rate`.
        run: Consecutive pauses at each place: `pause.run`.

    Raises:
        ConfigError: There is no such policy.
    """

    placement: str
    rate: float
    run: int = 1

    def __post_init__(self) -> None:
        try:
            resolve_policy(self.placement)
        except ConfigError as error:
            raise ConfigError(str(error).replace("pause.placement", "finetune.answer_placement")) from error

    def most(self, size: int) -> int | None:
        """Return the largest number of pauses within an answer; None where a policy of the user's decides.

        Args:
            size: A, its tokens without EOD.
        """
        if self.placement in _FIXED:
            return self._places(size) * self.run
        return size * self.run if self.placement in POLICIES else None

    def gaps(self, answer: np.ndarray, *address: object, number: int) -> np.ndarray:
        """Return the gaps of an answer.

        Args:
            answer: Its ids without EOD, [A].
            *address: Seed, task and epoch.
            number: Number of the example.

        Returns:
            Gaps in 1..A, int64, ascending. A gap that is there r times has r pauses.

        Raises:
            ConfigError: A policy of the user's returned something else.
        """
        if not answer.size:
            return NO_GAPS
        text = answer.astype(np.int64)
        text.flags.writeable = False
        key = np.array(philox_key(*address, "answers"), dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, number, 0)))
        gaps = np.asarray(resolve_policy(self.placement)(text, self._places(answer.size), self.rate, rng))
        if gaps.ndim != 1 or (gaps.size and gaps.dtype.kind not in "iu"):
            raise self._error(number, f"an array of integers with one axis, got {gaps.dtype} of shape {gaps.shape}")
        gaps = np.sort(gaps.astype(np.int64))
        if gaps.size and (gaps[0] < 1 or gaps[-1] > text.size):
            raise self._error(number, f"gaps from 1 to {text.size}, got some from {gaps[0]} to {gaps[-1]}")
        return gaps.repeat(self.run)

    def _places(self, size: int) -> int:
        return round(self.rate * size / self.run)

    def _error(self, number: int, expected: str) -> ConfigError:
        return ConfigError(f"finetune.answer_placement={self.placement}: expected {expected} (example {number})")
