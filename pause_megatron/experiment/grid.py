"""Expansion of a grid into cells, and the points that each evaluation measures. Starts and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pause_megatron.config.identity import digest_keys
from pause_megatron.config.presets import flops_per_token
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.cell import INPUT, OUTPUT, Cell, Estimate
from pause_megatron.experiment.combinations import Combination, combinations
from pause_megatron.experiment.finetunings import FinetuningRun, finetuning
from pause_megatron.experiment.inputs import NOT_READ, Inputs
from pause_megatron.experiment.models import Pretraining, as_overrides, resolve_models
from pause_megatron.experiment.schema import Grid


@dataclass(frozen=True)
class Point:
    """One point of a table or curve that an evaluate cell measures. Several points may share a cell.

    Attributes:
        variant: Name of the variant.
        task: Name of the task in the grid.
        m_ft: Pauses in finetuning as the grid has them: "10", "0..50"; "0" with standard finetuning.
        seed: Seed of the finetuning.
        m_inf: Pauses at inference of the variant; further ones belong to curves.
        cell: The evaluate cell.
        held_out: The evaluate cell of the held-out part of train, on which M_ft and M_inf are chosen; None where there
            is nothing to choose, or `evaluate.select` is eval.
    """

    variant: str
    task: str
    m_ft: str
    seed: int
    m_inf: tuple[int, ...]
    cell: Cell
    held_out: Cell | None = None


@dataclass(frozen=True)
class CellGraph:
    """The cells of a grid, each once, and the points that its evaluations measure.

    Attributes:
        cells: The cells, inputs before the cells that depend on them.
        points: The points.
    """

    cells: tuple[Cell, ...]
    points: tuple[Point, ...]


def expand(grid: Grid, inputs: Inputs) -> CellGraph:
    """Return all cells of a grid.

    Args:
        grid: The grid.
        inputs: Content of its inputs.

    Raises:
        ConfigError: A key of a run does not fit, or two different cells have one folder name.
    """
    expansion = _Expansion(grid, inputs, resolve_models(grid, inputs.vocabulary))
    points = tuple(expansion.point(which) for which in combinations(grid))
    _refuse_equal_names(expansion.cells)
    return CellGraph(tuple(expansion.cells.values()), points)


@dataclass
class _Expansion:
    """The cells of a grid while it is expanded.

    Attributes:
        grid: The grid.
        inputs: Content of its inputs.
        models: Its pretraining runs.
        cells: Cells by fingerprint, in the order of their first use.
    """

    grid: Grid
    inputs: Inputs
    models: Mapping[str, Pretraining]
    cells: dict[str, Cell] = field(default_factory=dict)

    def point(self, which: Combination) -> Point:
        """Add the cells of a combination and return its point."""
        run = finetuning(self.grid, which, self.models[self.grid.variants[which.variant].model])
        pretrained = self._shared(self._pretrain(self.grid.variants[which.variant].model))
        scores = self._scores(which, run, pretrained)
        exported = self._shared(_export(self._shared(self._finetune(which, run, pretrained, scores))))
        own, held = which.own_pauses(self.grid), None
        measured = self._shared(self._evaluate(which, exported, which.all_pauses(self.grid)))
        if fraction := which.held_out(self.grid):
            held = self._shared(self._evaluate(which, exported, own, fraction))
        return Point(which.variant, which.task, str(which.m_ft), which.seed, own, measured, held)

    def _shared(self, cell: Cell) -> Cell:
        """Return the cell, or the earlier one of the same content."""
        return self.cells.setdefault(cell.fingerprint, cell)

    def _pretrain(self, name: str) -> Cell:
        model = self.models[name]
        train = model.config.train
        prefix = as_overrides({"data.prefix": self.grid.data.prefix})
        name_of_side = model.config.data.side
        side = {} if name_of_side is None else {"side": self.inputs.sides.get(name_of_side, NOT_READ)}
        return Cell(
            f"pretrain-{name}",
            "pretrain",
            (*model.source, *model.overrides, *prefix, f"run.dir={OUTPUT}"),
            {"config": _plain(digest_keys(model.config)), "corpus": self.inputs.corpus, **side},
            estimate=Estimate(
                train.steps,
                train.tokens,
                model.flops_per_token,
                model.parameters,
                model.spent.about if model.spent else "",
            ),
        )

    def _scores(self, which: Combination, run: FinetuningRun, pretrained: Cell) -> Cell | None:
        """Add the cell that scores the task's answers for a finetuning, and return it; None if the row has none."""
        kind, task = self.grid.variants[which.variant].scores, run.config.task
        if kind is None:
            return None
        exported = self._shared(_export(pretrained))
        # Without a held-out part a finetuning takes the first records, which `score` takes among all of them.
        limited = task.limit if task.held_out is not None else None
        deciding = {"--task": task.name, "--kind": kind, "--task-limit": limited, "--held-out": task.held_out or 0.0}
        given = deciding | {"--task-path": self.grid.data.tasks, "--device": self.grid.evaluate.device}
        options = tuple(part for name, value in given.items() for part in _option(name, value))
        model = pretrained.name.removeprefix("pretrain-")
        return self._shared(
            Cell(
                f"score-{model}-{which.task}-{kind}",
                "score",
                # What an attempt with other options left is replaced, such as one on a GPU.
                ("--model", INPUT, *options, "--output", OUTPUT, "--overwrite"),
                {
                    "options": {name: value for name, value in deciding.items() if value is not None},
                    "records": self.inputs.tasks[which.task].train,
                },
                exported,
                estimate=Estimate(flops_per_token=_forward(self.models[model], self.inputs)),
            )
        )

    def _finetune(self, which: Combination, run: FinetuningRun, pretrained: Cell, scores: Cell | None) -> Cell:
        variant, config = self.grid.variants[which.variant], run.config
        records = self.inputs.tasks[which.task]
        marks = _marks(variant.set) + (f"-{variant.scores}" if variant.scores else "")
        name = f"finetune-{variant.model}-{which.task}-m{which.m_ft}{marks}-s{which.seed}"
        folder = () if records.folder is None else as_overrides({"task.path": records.folder})
        file = config.task.scores if scores is None else None
        content = {} if file is None else {"scores": self.inputs.scores.get(file, NOT_READ)}
        rows = self.inputs.vocabulary + config.pause.embeddings
        per_token = flops_per_token(config.model, rows, config.data.sequence_length)
        return Cell(
            name.replace("..", "to"),
            "finetune",
            (
                *(("--recipe", run.recipe) if run.recipe else ()),
                *run.overrides,
                f"model.from={INPUT}",
                *folder,
                f"run.dir={OUTPUT}",
            ),
            {"config": _plain(digest_keys(config)), "records": records.train, **content},
            pretrained,
            scores,
            Estimate(config.train.steps, config.train.tokens, per_token),
        )

    def _evaluate(
        self, which: Combination, exported: Cell, m_inf: tuple[int, ...], held_out: float | None = None
    ) -> Cell:
        """Return the cell that scores a model, on the held-out part of train if its fraction is given."""
        grid, section = self.grid, self.grid.tasks[which.task]
        variant = grid.variants[which.variant]
        inference, model = variant.inference, self.models[variant.model]
        deciding = {
            "--tasks": section.task or which.task,
            "--pauses": ",".join(map(str, m_inf)),
            "--limit": section.limit or grid.evaluate.limit,
            "--seed": which.seed,
            "--location": inference.location,
            "--filler": inference.filler,
            "--split": held_out and "held-out",
            "--held-out": held_out,
            **inference.decoding.options,
        }
        given = deciding | {
            "--task-path": grid.data.tasks,
            "--batch-size": grid.evaluate.batch_size,
            "--device": grid.evaluate.device,
        }
        options = tuple(part for name, value in given.items() for part in _option(name, value))
        filler = "" if inference.filler is None else "-filler"
        location = "" if inference.location is None else f"-{inference.location}"
        location += _marks({name: f"{name[8:]}{value}" for name, value in inference.decoding.options.items()})
        curve = f"-curve{m_inf[0]}to{m_inf[-1]}" if len(m_inf) > 1 else f"-at{m_inf[0]}"
        records = self.inputs.tasks[which.task]
        return Cell(
            exported.name.replace("export", "evaluate", 1) + filler + location + curve + "-held-out" * bool(held_out),
            "evaluate",
            ("--model", INPUT, *options, "--output", OUTPUT),
            {
                "options": {name: value for name, value in deciding.items() if value is not None},
                "records": records.held_out if held_out else records.evaluation,
            },
            exported,
            estimate=Estimate(flops_per_token=_forward(model, self.inputs)),
        )


def _export(trained: Cell) -> Cell:
    name = trained.name.replace("finetune", "export", 1).replace("pretrain", "export", 1)
    return Cell(name, "export-hf", (INPUT, OUTPUT), {}, trained)


def _forward(model: Pretraining, inputs: Inputs) -> float:
    """Return the FLOPs of a token in a forward pass, a third. How many there are depends on the records' lengths."""
    return flops_per_token(model.config.model, inputs.vocabulary + model.config.pause.embeddings, 0) / 3


def _option(name: str, value: Any) -> tuple[str, ...]:
    """Return an option of the command line; nothing where it has no value."""
    if isinstance(value, bool):
        return (name if value else f"--no-{name[2:]}",)
    text = str(value)
    if text.startswith("-"):  # a regular expression, which argparse would take for an option
        return (f"{name}={text}",)
    return () if value is None else (name, text)


def _marks(keys: Mapping[str, Any]) -> str:
    """Return the values of a variant's keys as part of a name: finetune.location=prepend -> "-prepend"."""
    marks = ("".join(c if c.isalnum() else "_" for c in str(value)) for value in keys.values())
    return "".join(f"-{mark}" for mark in marks)


def _plain(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys with lists in place of tuples, as JSON has them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}


def _refuse_equal_names(cells: Mapping[str, Cell]) -> None:
    """Check that no two cells share a folder, whose name ends in 8 digits of the fingerprint."""
    folders: dict[str, Cell] = {}
    for cell in cells.values():
        other = folders.setdefault(cell.folder_name, cell)
        if other is not cell:
            raise ConfigError(f"cells: expected a folder each, got two in {cell.folder_name}; rename a model or task")
