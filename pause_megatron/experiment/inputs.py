"""What a grid begins from: the corpus and the tasks' records, by their content. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pause_megatron.config.blend import is_number
from pause_megatron.data.corpus.manifest import Manifest
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.schema import Grid
from pause_megatron.tasks import fingerprint, load_task, read_examples

ASSUMED_VOCABULARY = 32_000
NOT_READ = "not read"


@dataclass(frozen=True)
class Records:
    """Records of one task.

    Attributes:
        folder: of this task, or None for the Hugging Face Hub.
        train, evaluation: fingerprints of the examples.
        scored: examples that an evaluation scores; None if not read.
    """

    folder: str | None
    train: str = NOT_READ
    evaluation: str = NOT_READ
    scored: int | None = None


@dataclass(frozen=True)
class Inputs:
    """Content of everything that a grid is given.

    Attributes:
        corpus: fingerprint of the corpus or blend.
        vocabulary: text tokens.
        tasks: by the grid's names.
    """

    corpus: str
    vocabulary: int
    tasks: Mapping[str, Records]


def assume(grid: Grid) -> Inputs:
    """Stand-ins for a dry run without data."""
    return Inputs(NOT_READ, ASSUMED_VOCABULARY, {name: Records(None) for name in grid.tasks})


def gather(grid: Grid) -> Inputs:
    """Read what a grid is given.

    Raises:
        ConfigError: data.prefix is missing, or a task is unknown. DataError: a corpus or record that cannot be used.
    """
    if not grid.data.prefix:
        raise ConfigError(
            "data.prefix: expected the prefix of a prepared corpus (see pause-megatron prepare), got none"
        )
    words = grid.data.prefix
    manifests = {word: Manifest.load(word) for word in words if not is_number(word)}
    corpus = " ".join(manifests[word].fingerprint if word in manifests else word for word in words)
    vocabulary = next(iter(manifests.values())).tokenizer.vocab_size
    return Inputs(corpus, vocabulary, {name: _records(grid, name) for name in grid.tasks})


def _records(grid: Grid, name: str) -> Records:
    section = grid.tasks[name]
    task = load_task(section.task or name)
    folder = os.path.join(grid.data.tasks, task.folder) if grid.data.tasks else None
    limit = {**grid.finetune.set, **section.set}.get("task.limit")
    train = read_examples(task, "train", path=folder, limit=limit)
    scored = read_examples(task, "eval", path=folder, limit=section.limit or grid.evaluate.limit)
    return Records(folder, fingerprint(train), fingerprint(scored), len(scored))
