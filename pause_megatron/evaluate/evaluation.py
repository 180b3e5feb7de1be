"""Evaluation of one task under one setting, from examples to results.json; finished batches are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pause_megatron.errors import DataError
from pause_megatron.evaluate.identity import Identity, OwnDecoding, Settings
from pause_megatron.evaluate.results import ResultsFolder
from pause_megatron.evaluate.scoring import Scorer
from pause_megatron.evaluate.stored import ResultEntry
from pause_megatron.inference import PauseGenerator
from pause_megatron.tasks import DeclaredTask, Example, Task, fingerprint, metrics_of

Report = Callable[[int, int, int], None]
"""(records done, records in all, records of an earlier run)."""


def identify(task: Task, examples: Sequence[Example], settings: Settings, folder: ResultsFolder) -> Identity:
    """Return the identity of an evaluation: everything that its outcomes depend on.

    Args:
        task: The task.
        examples: The examples to score.
        settings: Pauses and dtype.
        folder: Output folder; it knows the model.
    """
    decoding = task.decoding
    return Identity(
        task=task.name,
        model=folder.model,
        data=fingerprint(examples),
        settings=settings,
        decoding=OwnDecoding(
            max_new_tokens=decoding.max_new_tokens,
            stop=decoding.stop,
            metrics=tuple(task.metrics),
            code={name: metric.code for name, metric in metrics_of(task).items() if metric.code},
            few_shot=task.few_shot.count if isinstance(task, DeclaredTask) and task.few_shot else 0,
        ),
    )


def evaluate(
    generator: PauseGenerator,
    task: Task,
    examples: Sequence[Example],
    settings: Settings,
    folder: ResultsFolder,
    *,
    batch_size: int = 8,
    report: Report | None = None,
) -> list[ResultEntry]:
    """Score all examples, append samples batch by batch, and add the result to results.json.

    Args:
        generator: The model.
        task: The task; it gives decoding and metrics.
        examples: The examples to score; their ids must differ.
        settings: Pauses and dtype.
        folder: Output folder; this process must hold its lock (`opened`).
        batch_size: Largest number of rows of a forward pass. Answers do not depend on it.
        report: Progress callback, called with (records done, records in all, records of an earlier run).

    Returns:
        The entries of results.json, one for each metric.

    Raises:
        ConfigError: The settings do not fit the model.
        DataError: There are no examples, an example does not fit, or the folder holds results of something else.
    """
    if not examples:
        raise DataError(f"{task.name}: expected at least one record, got none")
    scorer = Scorer(generator, task, settings, batch_size)
    identity = identify(task, examples, settings, folder)
    prepared = scorer.prepare(examples)
    with folder.journal(identity, [item.example.id for item in prepared]) as journal:
        resumed = len(journal.samples)
        if report is not None:
            report(resumed, len(prepared), resumed)
        for batch in scorer.batches(prepared[resumed:]):
            journal.append(*scorer.score(batch))
            if report is not None:
                report(len(journal.samples), len(prepared), resumed)
        groups = {example.id: example.group for example in examples}
        entries = folder.summarise(identity, journal.samples, task.primary, groups)
    folder.add(entries)
    return entries
