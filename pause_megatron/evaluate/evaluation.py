"""One task, one setting, from examples to results.json; what is there already is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pause_megatron.errors import DataError
from pause_megatron.evaluate.journal import Record
from pause_megatron.evaluate.results import Identity, ResultsFolder, Settings
from pause_megatron.evaluate.scoring import Scorer
from pause_megatron.inference import PauseGenerator
from pause_megatron.tasks import Example, Task, fingerprint

Report = Callable[[int, int, int], None]


def identify(task: Task, examples: Sequence[Example], settings: Settings, folder: ResultsFolder) -> Identity:
    """What the outcomes of a task will depend on."""
    return Identity(
        task=task.name,
        model=folder.model,
        data=fingerprint(examples),
        settings=settings,
        decoding={
            "max_new_tokens": task.decoding.max_new_tokens,
            "stop": list(task.decoding.stop),
            "metrics": list(task.metrics),
        },
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
) -> list[Record]:
    """Ask all examples, write samples as they come, and put the result into results.json.

    Args:
        generator: the model.
        task: what is asked.
        examples: of whom; ids must differ.
        settings: pauses and the like.
        folder: where results go; this process must be its only writer (`opened`).
        batch_size: rows of a forward pass at most. Answers do not depend on it.
        report: called with (records done, records in all, records that an earlier run had done).

    Returns:
        the entries of results.json, one for each metric.

    Raises:
        ConfigError: settings that do not fit the model.
        DataError: no examples, an example that cannot be asked, or results of something else in the folder.
    """
    if not examples:
        raise DataError(f"{task.name}: expected at least one record, got none")
    scorer = Scorer(generator, task, settings, batch_size)
    identity = identify(task, examples, settings, folder)
    prepared = scorer.prepare(examples)
    with folder.journal(identity, [item.example.id for item in prepared]) as journal:
        found = len(journal.records)
        if report is not None:
            report(found, len(prepared), found)
        for batch in scorer.batches(prepared[found:]):
            journal.append(*scorer.ask(batch))
            if report is not None:
                report(len(journal.records), len(prepared), found)
        entries = folder.summarise(identity, journal.records, task.primary)
    folder.add(entries)
    return entries
