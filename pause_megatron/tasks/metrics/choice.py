"""Multiple-choice accuracy by log-likelihood; the first of equal choices wins, as in lm-eval.

Choices are continuations with their leading blank, which is not counted. The lengths are therefore those of lm-eval's
acc_norm (characters) and acc_bytes (bytes of UTF-8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def choice_accuracy(log_likelihoods: Sequence[float], choices: Sequence[str], gold: int) -> float:
    """Return 1.0 if the choice of the largest log-likelihood is the right one, else 0.0.

    Args:
        log_likelihoods: Log-likelihood of each choice, nats.
        choices: The continuations.
        gold: Index of the right choice.
    """
    return _accuracy(log_likelihoods, [1] * len(choices), gold)


def choice_accuracy_norm(log_likelihoods: Sequence[float], choices: Sequence[str], gold: int) -> float:
    """Return `choice_accuracy` by log-likelihood per character (lm-eval's acc_norm).

    Args:
        log_likelihoods: Log-likelihood of each choice, nats.
        choices: The continuations.
        gold: Index of the right choice.
    """
    return _accuracy(log_likelihoods, [len(choice.lstrip()) for choice in choices], gold)


def choice_accuracy_bytes(log_likelihoods: Sequence[float], choices: Sequence[str], gold: int) -> float:
    """Return `choice_accuracy` by log-likelihood per byte of UTF-8 (lm-eval's acc_bytes).

    Args:
        log_likelihoods: Log-likelihood of each choice, nats.
        choices: The continuations.
        gold: Index of the right choice.
    """
    return _accuracy(log_likelihoods, [len(choice.lstrip().encode()) for choice in choices], gold)


def _accuracy(log_likelihoods: Sequence[float], lengths: Sequence[int], gold: int) -> float:
    if len(log_likelihoods) != len(lengths):
        raise ValueError(f"expected {len(lengths)} log-likelihoods, one per choice, got {len(log_likelihoods)}")
    if any(map(math.isnan, log_likelihoods)):
        raise ValueError(f"expected log-likelihoods without NaN, got {list(log_likelihoods)}")
    if not all(lengths):
        raise ValueError(f"expected choices that are not blank, got choice {lengths.index(0)} without a character")
    scores = [value / length for value, length in zip(log_likelihoods, lengths, strict=True)]
    return float(scores.index(max(scores)) == gold)
