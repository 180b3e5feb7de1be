"""The metrics by name, how to register one, and which part of a generated text is the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeVar

from pause_megatron.errors import ConfigError
from pause_megatron.tasks.metrics.choice import choice_accuracy, choice_accuracy_bytes, choice_accuracy_norm
from pause_megatron.tasks.metrics.number import final_number, final_number_flexible
from pause_megatron.tasks.metrics.text import coqa_f1, exact_match, f1, last_word

Reads = Literal["text", "choices"]
Function = TypeVar("Function", bound=Callable[..., float])


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score for each record. The value of a task is the mean over its records.

    Attributes:
        name: The function's name; task files and results use it.
        reads: "text" calls per_record(prediction, references), where the prediction is `answer_in` of the generated
            text. "choices" calls per_record(log_likelihoods, choices, gold).
        per_record: The function; it returns a score in [0, 1].
        higher_is_better: Whether a larger score is the better one.
    """

    name: str
    reads: Reads
    per_record: Callable[..., float]
    higher_is_better: bool = True


_METRICS: dict[str, Metric] = {}
METRICS: Mapping[str, Metric] = MappingProxyType(_METRICS)
"""Every registered metric by its name."""


def register_metric(*, reads: Reads = "text") -> Callable[[Function], Function]:
    """Return a decorator that registers a function as the metric of its name.

    Args:
        reads: What the function compares; see `Metric`.

    Raises:
        ConfigError: Another function is registered under that name.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        known = _METRICS.get(name)
        if known is not None and known.per_record.__module__ != function.__module__:
            raise ConfigError(f"metric {name}: expected a new name, got that of {known.per_record.__module__}.{name}")
        _METRICS[name] = Metric(name=name, reads=reads, per_record=function)
        return function

    return register


def answer_in(text: str, stop: Iterable[str] = ()) -> str:
    """Return the answer in a generated text: what precedes the first stop text, stripped of white space.

    The answer is the same whether generation ended at a stop text or went past it.

    Args:
        text: The generated text.
        stop: Texts that end an answer.
    """
    ends = [start for start in map(text.find, stop) if start >= 0]
    return text[: min(ends, default=len(text))].strip()


for _function in (exact_match, f1, coqa_f1, final_number, final_number_flexible, last_word):
    register_metric(reads="text")(_function)
for _choice_function in (choice_accuracy, choice_accuracy_norm, choice_accuracy_bytes):
    register_metric(reads="choices")(_choice_function)
