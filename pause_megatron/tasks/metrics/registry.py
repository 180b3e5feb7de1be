"""The metrics by name, how to register one, and which part of a generated text is the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, get_args

from pause_megatron.config.spelling import nearest
from pause_megatron.config.user_code import import_attribute
from pause_megatron.errors import ConfigError
from pause_megatron.tasks.metrics.choice import choice_accuracy, choice_accuracy_bytes, choice_accuracy_norm
from pause_megatron.tasks.metrics.number import final_number, final_number_flexible
from pause_megatron.tasks.metrics.own import Reads, checked, code_digest, reads_of
from pause_megatron.tasks.metrics.text import coqa_exact_match, coqa_f1, exact_match, f1, last_word, nq_exact_match
from pause_megatron.tasks.task import Task

Function = TypeVar("Function", bound=Callable[..., float])


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A score for each record. The value of a task is the mean over its records.

    Attributes:
        name: The function's name, or 'module:function'; task files and results use it.
        reads: "text" calls per_record(prediction, references), where the prediction is `answer_in` of the generated
            text. "choices" calls per_record(log_likelihoods, choices, gold).
        per_record: The function; it returns a score in [0, 1].
        higher_is_better: Whether a larger score is the better one.
    """

    name: str
    reads: Reads
    per_record: Callable[..., float]
    higher_is_better: bool = True

    @property
    def code(self) -> str:
        """Digest of the code of a metric of one's own, a part of an evaluation's identity; "" for one that ships."""
        return "" if _ships(self.per_record) else code_digest(_function(self))


_METRICS: dict[str, Metric] = {}
METRICS: Mapping[str, Metric] = MappingProxyType(_METRICS)
"""Every registered metric by its name."""


def find_metric(name: str, folders: Sequence[Path] = ()) -> Metric:
    """Return the metric of a name; one that is named 'module:function' is imported and registered.

    Args:
        name: A name in `METRICS`, or 'module:function'.
        folders: Folders that are searched for the module before the import path.

    Raises:
        ConfigError: There is no such metric, or the function is none.
    """
    if ":" not in name:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise ConfigError(f"expected names of {known}, or 'module:function', got {name!r}{nearest(name, METRICS)}")
        return METRICS[name]
    function = import_attribute(name, folders)
    code_digest(function)  # while the file is what was imported
    known_as = next((each for each in _METRICS.values() if _function(each) is function), None)
    if known_as is not None and known_as.name == name:
        return known_as
    reads = known_as.reads if known_as is not None else reads_of(function, name)
    _METRICS[name] = Metric(name=name, reads=reads, per_record=checked(function, name))
    return _METRICS[name]


def metrics_of(task: Task) -> Mapping[str, Metric]:
    """Return the metrics of a task by their names; those of a task file are found beside it.

    Args:
        task: The task.
    """
    found = getattr(task, "found_metrics", METRICS)
    return {name: found[name] for name in task.metrics}


def register_metric(*, reads: Reads = "text") -> Callable[[Function], Function]:
    """Return a decorator that registers a function as the metric of its name. Without it, 'module:function' names one.

    Args:
        reads: What the function compares; see `Metric`.

    Raises:
        ConfigError: `reads` is neither "text" nor "choices", or another function is registered under that name.
    """
    if reads not in get_args(Reads):
        raise ConfigError(f"register_metric: reads: expected 'text' or 'choices', got {reads!r}")

    def register(function: Function) -> Function:
        name = function.__name__
        known = _METRICS.get(name)
        if known is not None and known.per_record.__module__ != function.__module__:
            raise ConfigError(f"metric {name}: expected a new name, got that of {known.per_record.__module__}.{name}")
        per_record = function if _ships(function) else checked(function, name)
        _METRICS[name] = Metric(name=name, reads=reads, per_record=per_record)
        return function

    return register


def _function(metric: Metric) -> Callable[..., float]:
    """Return the function that was registered, without the check of its score."""
    return getattr(metric.per_record, "__wrapped__", metric.per_record)


def _ships(function: Callable[..., float]) -> bool:
    return str(getattr(function, "__module__", "")).startswith("pause_megatron.")


def answer_in(text: str, stop: Iterable[str] = ()) -> str:
    """Return the answer in a generated text: what precedes the first stop text, stripped of white space.

    The answer is the same whether generation ended at a stop text or went past it.

    Args:
        text: The generated text.
        stop: Texts that end an answer.
    """
    ends = [start for start in map(text.find, stop) if start >= 0]
    return text[: min(ends, default=len(text))].strip()


for _text_function in (
    *(exact_match, f1, nq_exact_match, coqa_f1, coqa_exact_match),
    *(final_number, final_number_flexible, last_word),
):
    register_metric(reads="text")(_text_function)
for _choice_function in (choice_accuracy, choice_accuracy_norm, choice_accuracy_bytes):
    register_metric(reads="choices")(_choice_function)
