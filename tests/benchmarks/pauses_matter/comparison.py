"""The subject against each control: differences paired by seed, corrected for their number, and the verdict."""

from __future__ import annotations

import statistics as plain
from collections.abc import Sequence
from dataclasses import dataclass

from pause_megatron.errors import DataError
from pause_megatron.evaluate.statistics import PairedT, holm, logit_interval, paired_t

from .settings import Plan

SIGNIFICANT = 0.05
SAME_SIZE = 1.05


@dataclass(frozen=True)
class Measured:
    """A setting's accuracies over seeds, with their mean and its 95 % interval."""

    values: Sequence[float]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The subject minus a control.

    Attributes:
        control: its name.
        difference: mean over seeds, with its 95 % interval [low, high].
        p_value: two-sided, of a paired t-test, after Holm's correction over all controls.
        apart: the two settings' intervals do not overlap, and the subject's is the higher one.
        same_size: the control is at most 5 % larger than the subject. All have at most the subject's training FLOPs.
    """

    control: str
    difference: float
    low: float
    high: float
    p_value: float
    apart: bool
    same_size: bool

    @property
    def passed(self) -> bool:
        """The subject is better: intervals apart, and a corrected p below 0.05."""
        return self.apart and self.p_value < SIGNIFICANT


def measured(values: Sequence[float], prompts: int) -> Measured:
    """Mean and interval of accuracies, one for each seed, each of as many prompts.

    Raises:
        DataError: there are fewer than two seeds.
    """
    interval = logit_interval(values, records=prompts)
    if interval is None:
        raise DataError(f"results: expected final runs of two seeds or more, got {len(values)}")
    return Measured(values, plain.fmean(values), *interval)


def compare(subject: str, found: dict[str, Measured], plans: dict[str, Plan]) -> list[Comparison]:
    """The subject against every other setting.

    Args:
        subject: its name.
        found: accuracies by setting, seed by seed in the same order.
        plans: by setting.
    """
    mine, controls = found[subject], [name for name in found if name != subject]
    differences = {name: [a - b for a, b in zip(mine.values, found[name].values, strict=True)] for name in controls}
    tests = {name: paired_t(of) for name, of in differences.items()}
    corrected = holm([_p_value(tests[name], differences[name]) for name in controls])
    return [
        Comparison(
            control=name,
            difference=tests[name].value,
            low=_end(tests[name].low, tests[name]),
            high=_end(tests[name].high, tests[name]),
            p_value=p_value,
            apart=mine.low > found[name].high,
            same_size=plans[name].parameters <= SAME_SIZE * plans[subject].parameters,
        )
        for name, p_value in zip(controls, corrected, strict=True)
    ]


def _p_value(test: PairedT, differences: Sequence[float]) -> float:
    """Of the t-test; differences without any spread have none, and get that of the sign test."""
    if test.p_value is not None:
        return test.p_value
    return 2 * 0.5 ** len(differences) if any(differences) else 1.0


def _end(end: float | None, test: PairedT) -> float:
    return test.value if end is None else end


def verdict(comparisons: Sequence[Comparison], seeds: int, declared: int) -> str:
    """Whether the claim survives, against all controls and against those of the subject's size.

    Args:
        comparisons: one for each control.
        seeds: number of seeds that every setting was trained with.
        declared: number of seeds that it was to be trained with; before all are there, nothing is said.
    """
    if seeds < declared:
        return f"**Undecided: {seeds} of {declared} declared seeds.**"

    def line(what: str, some: Sequence[Comparison]) -> str:
        failed = [one.control for one in some if not one.passed]
        answer = f"no; not against {', '.join(failed)}" if failed else "yes"
        return f"**Survives {what}: {answer}.**"

    same = [one for one in comparisons if one.same_size]
    return f"{line('every control', comparisons)}\n\n{line('the controls of the same size', same)}"
