"""Every metric by its name, and what counts as the answer in what a model wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pause_megatron.tasks.metrics.choice import choice_accuracy, choice_accuracy_bytes, choice_accuracy_norm
from pause_megatron.tasks.metrics.number import final_number, final_number_flexible
from pause_megatron.tasks.metrics.text import coqa_f1, exact_match, f1, last_word


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric: a score for each record; a task's value is their mean.

    Attributes:
        reads: "text": per_record(prediction, references), the prediction being `answer_in` of what was written;
            "choices": per_record(log_likelihoods, choices, gold).
        per_record: gives a score in [0, 1].
    """

    name: str
    reads: Literal["text", "choices"]
    per_record: Callable[..., float]
    higher_is_better: bool = True


def answer_in(text: str, stop: Iterable[str] = ()) -> str:
    """What counts as the answer: the text before the first stop text, without white space around it.

    It does not matter whether generation ended at a stop text or went on.
    """
    ends = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(ends, default=len(text))].strip()


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        function.__name__: Metric(name=function.__name__, reads=reads, per_record=function)
        for reads, functions in (
            ("text", (exact_match, f1, coqa_f1, final_number, final_number_flexible, last_word)),
            ("choices", (choice_accuracy, choice_accuracy_norm, choice_accuracy_bytes)),
        )
        for function in functions
    }
)
