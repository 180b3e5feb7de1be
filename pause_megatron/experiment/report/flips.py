"""Differences between two evaluations record by record: which answers flipped, and how likely that is by chance."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pause_megatron.errors import DataError
from pause_megatron.evaluate.journal import read_samples
from pause_megatron.evaluate.results import read_results
from pause_megatron.evaluate.statistics import Difference, paired_bootstrap
from pause_megatron.evaluate.stored import Sample
from pause_megatron.experiment.cell import PRODUCT
from pause_megatron.experiment.stored import CellFile
from pause_megatron.tasks import DeclaredTask, Example, fingerprint, load_task, read_examples
from pause_megatron.tasks.examples import Part


@dataclass(frozen=True)
class Outcomes:
    """The answers of one evaluation with one number of pauses.

    Attributes:
        folder: Folder of the cell.
        pauses: Pauses at inference.
        metric: The primary metric.
        data: Fingerprint of the records.
        samples: Outcome of each record by its id.
    """

    folder: Path
    pauses: int
    metric: str
    data: str
    samples: Mapping[str, Sample]

    @property
    def label(self) -> str:
        """Name in messages and tables."""
        return f"{self.folder.name}@{self.pauses}"

    @property
    def scores(self) -> dict[str, float]:
        """Score of each record by its id."""
        return {name: float(sample.scores[self.metric]) for name, sample in self.samples.items()}


@dataclass(frozen=True)
class Flips:
    """Two evaluations of the same records, compared record by record.

    Attributes:
        one: The first evaluation, such as the baseline's.
        other: The second one.
        gained: Ids of the records that the second scores higher (wrong -> right), in the order of the samples.
        lost: Ids of the records that the second scores lower (right -> wrong).
        same: Number of records with equal scores above 0 (both right).
        neither: Number of records that both score 0 (both wrong).
        difference: Difference of the means, second - first, with the bootstrap by group.
    """

    one: Outcomes
    other: Outcomes
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    same: int
    neither: int
    difference: Difference

    @property
    def binary(self) -> bool:
        """Whether every score is 0 or 1, so that an answer is right or wrong."""
        return all(value in (0, 1) for each in (self.one, self.other) for value in each.scores.values())

    @property
    def p_value(self) -> float:
        """McNemar's exact p-value (of fractions: the sign test's). It treats records as independent."""
        return mcnemar(len(self.gained), len(self.lost))


@dataclass(frozen=True)
class Records:
    """Prompts and references of an evaluation's records.

    Attributes:
        examples: Examples by id; empty if they cannot be read.
        missing: Why they cannot be read; "" if they can.
    """

    examples: Mapping[str, Example] = field(default_factory=dict)
    missing: str = ""


def mcnemar(gained: int, lost: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: of g + l flips, each direction has probability 1/2.

    Args:
        gained: Number of records that only the second model answers.
        lost: Number of records that only the first model answers.
    """
    count, fewer = gained + lost, min(gained, lost)
    if count == 0:
        return 1.0
    tail = term = 1
    for each in range(fewer):
        term = term * (count - each) // (each + 1)  # count over each + 1
        tail += term
    return min(1.0, 2 * tail / 2**count)


def read_outcomes(folder: Path, pauses: int | None = None) -> Outcomes:
    """Return the answers of an evaluate cell.

    Args:
        folder: Folder of the cell.
        pauses: Pauses at inference; None if the cell has one number only.

    Raises:
        DataError: It is no finished evaluation, or it has no, or several, such numbers of pauses.
    """
    cell = CellFile.read(folder)
    if cell.verb != "evaluate":
        raise DataError(f"{folder.name}: expected a cell of evaluate, got one of {cell.verb}")
    results = folder / PRODUCT["evaluate"]
    entries = {entry.pauses: entry for entry in read_results(results) if entry.primary}
    if pauses is None and len(entries) == 1:
        pauses = next(iter(entries))
    if pauses not in entries:
        counts = ", ".join(f"@{count}" for count in sorted(entries))
        got = "none" if pauses is None else f"@{pauses}"
        raise DataError(f"{folder.name}: expected a number of pauses at inference, one of {counts}, got {got}")
    entry = entries[pauses]
    path = results / "samples" / f"{entry.settings.name(entry.task)}.jsonl"
    return Outcomes(folder, pauses, entry.metric, entry.data, read_samples(path))


def find_outcomes(directory: Path, word: str) -> Outcomes:
    """Return the answers that CELL@M names.

    Args:
        directory: Folder of the experiment.
        word: The beginning of the folder's name in DIR/cells, with "@M" for a number of pauses at inference.

    Raises:
        DataError: No cell, or several, begin so; or see `read_outcomes`.
    """
    name, _, count = word.partition("@")
    if count and not count.isdecimal():
        raise DataError(f"{word}: expected CELL@M with a number of pauses, got @{count}")
    folders = [path.parent for path in sorted(directory.glob("cells/*/cell.json"))]
    found = [folder for folder in folders if folder.name == name]
    found = found or [folder for folder in folders if folder.name.startswith(name)]
    if len(found) != 1:
        shown = ", ".join(folder.name for folder in found[:3]) or "none"
        raise DataError(f"{directory / 'cells'}: expected one folder that begins with {name!r}, got {shown}")
    return read_outcomes(found[0], int(count) if count else None)


def flips(one: Outcomes, other: Outcomes) -> Flips:
    """Return the comparison of two evaluations, record by record.

    Args:
        one: The first one.
        other: The second one.

    Raises:
        DataError: Their records or metrics differ.
    """
    for name in ("metric", "data"):
        if getattr(one, name) != getattr(other, name):
            raise DataError(
                f"{other.label}: {name}: expected {getattr(one, name)} (as {one.label}), got {getattr(other, name)}"
            )
    before, after = one.scores, other.scores
    groups = {name: sample.group for name, sample in one.samples.items() if sample.group}
    difference = paired_bootstrap(after, before, groups)
    return Flips(
        one,
        other,
        gained=tuple(name for name in before if after[name] > before[name]),
        lost=tuple(name for name in before if after[name] < before[name]),
        same=sum(after[name] == score > 0 for name, score in before.items()),
        neither=sum(after[name] == score == 0 for name, score in before.items()),
        difference=difference,
    )


def answer(sample: Sample, example: Example | None) -> str:
    """Return what a model answered, as text: the decoded answer, or the most likely choice.

    Args:
        sample: The outcome.
        example: The record; None if it cannot be read.
    """
    if sample.log_likelihoods and not isinstance(sample.prediction, str):
        best = max(range(len(sample.log_likelihoods)), key=sample.log_likelihoods.__getitem__)
        return example.choices[best].strip() if example and example.choices else f"choice {best + 1}"
    return sample.prediction if isinstance(sample.prediction, str) else str(sample.prediction)


def references(example: Example) -> Sequence[str]:
    """Return the right choice, or the accepted answers, each once."""
    if example.gold is not None and example.choices:
        return (example.choices[example.gold].strip(),)
    return tuple(dict.fromkeys(example.references))


def read_records(outcomes: Outcomes, root: str | None = None) -> Records:
    """Return prompts and references of the records that an evaluation scored, if they are on this machine.

    They are used only if their fingerprint is the one of the results. Nothing is downloaded.

    Args:
        outcomes: The evaluation.
        root: Folder that holds a folder per task, instead of the one of the evaluation.
    """
    arguments = CellFile.read(outcomes.folder).arguments
    given = dict(itertools.pairwise(arguments))
    root = root or given.get("--task-path")
    try:
        task = load_task(given["--tasks"])
        if root is None and isinstance(task, DeclaredTask):
            return Records(missing="they are on the Hugging Face Hub; give --task-path")
        folder = os.path.join(root, task.folder) if root else None
        part: Part = "held-out" if given.get("--split") == "held-out" else "eval"
        examples = _all_examples(given["--tasks"], part, folder, given.get("--held-out"))
    except Exception as error:  # a task from outside may raise anything; the report does without its prompts
        return Records(missing=f"{type(error).__name__}: {error}")
    scored = [example for example in examples if example.id in outcomes.samples]
    if fingerprint(scored) != outcomes.data:
        return Records(missing=f"those in {root} are others than were evaluated (fingerprint {outcomes.data})")
    return Records({example.id: example for example in scored})


@functools.lru_cache(maxsize=2)  # a report reads those of one task many times
def _all_examples(name: str, part: Part, folder: str | None, held_out: str | None) -> list[Example]:
    return read_examples(load_task(name), part, folder, held_out=float(held_out) if held_out else None)
