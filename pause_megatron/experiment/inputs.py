"""The inputs of a grid (corpus and task records) by their content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pause_megatron.config.blend import is_number
from pause_megatron.config.finetune_schema import TaskSection
from pause_megatron.data.corpus.manifest import CorpusManifest
from pause_megatron.data.corpus.side import find_side
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.experiment.models import resolve_models
from pause_megatron.experiment.schema import Grid
from pause_megatron.files.digest import file_digest
from pause_megatron.files.paths import expanded
from pause_megatron.tasks import fingerprint, load_task, metrics_of, read_examples

ASSUMED_VOCABULARY = 32_000
NOT_READ = "not read"


@dataclass(frozen=True)
class TaskRecords:
    """The records of one task.

    Attributes:
        folder: Folder of this task; None for the Hugging Face Hub.
        train: Fingerprint of the training examples.
        evaluation: Fingerprint of the evaluation examples, and of the code of metrics of one's own.
        held_out: The same of the held-out part of the training examples; not read where nothing is chosen on it.
        scored: Number of examples that an evaluation scores; None if not read.
    """

    folder: str | None
    train: str = NOT_READ
    evaluation: str = NOT_READ
    held_out: str = NOT_READ
    scored: int | None = None


@dataclass(frozen=True)
class Inputs:
    """The content of a grid's inputs.

    Attributes:
        corpus: Fingerprint of the corpus or blend.
        vocabulary: Number of text tokens.
        tasks: Records by the grid's names of tasks.
        sides: Digests of the side arrays that models use (`data.side`), by name.
        scores: Digests of the files of values of answers (`task.scores`), by path.
    """

    corpus: str
    vocabulary: int
    tasks: Mapping[str, TaskRecords]
    sides: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, str] = field(default_factory=dict)


def assumed_inputs(grid: Grid) -> Inputs:
    """Return placeholders for a dry run without data."""
    return Inputs(NOT_READ, ASSUMED_VOCABULARY, {name: TaskRecords(None) for name in grid.tasks})


def read_inputs(grid: Grid) -> Inputs:
    """Read the inputs of a grid.

    Raises:
        ConfigError: data.prefix is missing, or a task is unknown.
        DataError: A corpus or record cannot be used, or a corpus lacks a side array that a model needs.
    """
    if not grid.data.prefix:
        raise ConfigError(
            "data.prefix: expected the prefix of a prepared corpus (see pause-megatron prepare), got none"
        )
    words = grid.data.prefix
    manifests = {word: CorpusManifest.load(word) for word in words if not is_number(word)}
    corpus = " ".join(manifests[word].fingerprint if word in manifests else word for word in words)
    vocabulary = next(iter(manifests.values())).tokenizer.vocab_size
    sides = _sides(grid, manifests, vocabulary)
    return Inputs(corpus, vocabulary, {name: _records(grid, name) for name in grid.tasks}, sides, _scores(grid))


def _sides(grid: Grid, manifests: Mapping[str, CorpusManifest], vocabulary: int) -> dict[str, str]:
    """Return the digests of the side arrays that the models need."""
    found = {}
    for name, run in resolve_models(grid, vocabulary).items():
        side = run.config.data.side
        if side is None or side in found:
            continue
        try:
            arrays = [find_side(prefix, side, manifest) for prefix, manifest in manifests.items()]
        except DataError as error:
            raise DataError(f"models.{name}: data.side={side}: {error}") from None
        found[side] = " ".join(array.record.file.digest for array in arrays)
    return found


def _scores(grid: Grid) -> dict[str, str]:
    """Return the digests of the files of values of answers that the finetunings use."""
    found = {}
    sets = [
        grid.finetune.set,
        *(each.set for each in grid.tasks.values()),
        *(each.set for each in grid.variants.values()),
    ]
    for given in (keys["task.scores"] for keys in sets if keys.get("task.scores")):
        try:
            path = expanded(str(given))
            found[path] = file_digest(Path(path))
        except (OSError, ValueError) as error:
            raise DataError(f"task.scores={given}: expected a file of `score --task`, got none ({error})") from None
    return found


def _records(grid: Grid, name: str) -> TaskRecords:
    section = grid.tasks[name]
    task = load_task(section.task or name)
    folder = os.path.join(grid.data.tasks, task.folder) if grid.data.tasks else None
    keys = {**grid.finetune.set, **section.set}
    limit, held_out = keys.get("task.limit"), keys.get("task.held_out", TaskSection.model_fields["held_out"].default)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise ConfigError(f"tasks.{name}: task.limit: expected an integer, got {limit!r}")
    if held_out is not None and (isinstance(held_out, bool) or not isinstance(held_out, (int, float))):
        raise ConfigError(f"tasks.{name}: task.held_out: expected a number or null, got {held_out!r}")
    train = read_examples(task, "train", folder, limit, held_out, from_start=held_out is None)
    scored_limit = section.limit or grid.evaluate.limit
    scored = read_examples(task, "eval", folder, scored_limit)
    code = "".join(f" {metric.code}" for metric in metrics_of(task).values() if metric.code)
    held = NOT_READ
    if held_out and grid.evaluate.select == "held_out":
        held = fingerprint(read_examples(task, "held-out", folder, scored_limit, held_out)) + code
    return TaskRecords(folder, fingerprint(train), fingerprint(scored) + code, held, len(scored))
