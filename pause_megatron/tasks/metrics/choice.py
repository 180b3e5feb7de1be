"""Option scoring: which choice the model finds likeliest. The first of equals wins, as in lm-eval.

`choices` are continuations with their leading blank, which belongs to the prompt and is not counted: the lengths are
those of lm-eval's acc_norm (characters) and acc_bytes (bytes of UTF-8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def choice_accuracy(log_likelihoods: Sequence[float], choices: Sequence[str], gold: int) -> float:
    """1.0 where the choice of the largest log-likelihood (nats) is the right one, else 0.0."""
    return _accuracy(log_likelihoods, [1] * len(choices), gold)


def choice_accuracy_norm(log_likelihoods: Sequence[float], choices: Sequence[str], gold: int) -> float:
    """The same by log-likelihood per character (lm-eval's acc_norm)."""
    return _accuracy(log_likelihoods, [len(choice.lstrip()) for choice in choices], gold)


def choice_accuracy_bytes(log_likelihoods: Sequence[float], choices: Sequence[str], gold: int) -> float:
    """The same by log-likelihood per byte of UTF-8 (lm-eval's acc_bytes)."""
    return _accuracy(log_likelihoods, [len(choice.lstrip().encode()) for choice in choices], gold)


def _accuracy(log_likelihoods: Sequence[float], lengths: Sequence[int], gold: int) -> float:
    if len(log_likelihoods) != len(lengths):
        raise ValueError(f"expected {len(lengths)} log-likelihoods, one per choice; came {len(log_likelihoods)}")
    if any(map(math.isnan, log_likelihoods)):
        raise ValueError(f"expected log-likelihoods; came {list(log_likelihoods)}")
    scores = [value / length for value, length in zip(log_likelihoods, lengths, strict=True)]
    return float(scores.index(max(scores)) == gold)
