"""Expansion of a grid into cells, and the points that each evaluation measures. Starts and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pause_megatron.config.finetune_schema import TaskSection
from pause_megatron.config.identity import deciding_keys, digest_keys
from pause_megatron.config.load import load, recipe_names, recipe_path
from pause_megatron.config.model_from import OF_A_TASK, PAUSES, SHAPE
from pause_megatron.config.presets import flops_per_token
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.config.text import read_entries
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.cell import INPUT, OUTPUT, Cell, Estimate
from pause_megatron.experiment.inputs import NOT_READ, Inputs
from pause_megatron.experiment.models import Pretraining, as_overrides, resolve_models
from pause_megatron.experiment.schema import Grid, Pauses, Variant, highest

# What a finetuning takes from its initial checkpoint, unless it is given.
_INHERITED = frozenset({*(f"model.{name}" for name in SHAPE), *PAUSES, *OF_A_TASK})


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


class Combination(NamedTuple):
    """One finetuning of a grid and its evaluation.

    Attributes:
        variant: Name of the variant.
        task: Name of the task in the grid.
        m_ft: Pauses in finetuning.
        seed: Seed of the finetuning.
    """

    variant: str
    task: str
    m_ft: Pauses
    seed: int


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


def combinations(grid: Grid) -> Iterator[Combination]:
    """Yield every combination, seeds outermost, so that an experiment that is stopped early has whole seeds."""
    for seed in grid.seeds:
        for name, variant in grid.variants.items():
            for task in variant.tasks or grid.tasks:
                pauses = (0,) if variant.finetune == "standard" else variant.pauses or grid.tasks[task].pauses
                for m_ft in pauses:
                    yield Combination(name, task, m_ft, seed)


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
        variant = self.grid.variants[which.variant]
        pretrained = self._shared(self._pretrain(variant.model))
        finetuned = self._shared(self._finetune(which, pretrained))
        exported = self._shared(_export(finetuned))
        own = _own_pauses(variant, which.m_ft)
        m_inf = _all_pauses(self.grid, which.variant, which.task, which.m_ft)
        scored = self._shared(self._evaluate(which, exported, m_inf))
        held = None
        if self.grid.evaluate.select == "held_out" and (fraction := _held_out(self.grid, which)):
            held = self._shared(self._evaluate(which, exported, own, fraction))
        return Point(which.variant, which.task, str(which.m_ft), which.seed, own, scored, held)

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

    def _finetune(self, which: Combination, pretrained: Cell) -> Cell:
        variant, section = self.grid.variants[which.variant], self.grid.tasks[which.task]
        records = self.inputs.tasks[which.task]
        task_name = section.task or which.task
        recipe = section.recipe or (f"finetune-{task_name}" if f"finetune-{task_name}" in recipe_names() else None)
        overrides = (
            f"task.name={task_name}",
            *as_overrides({**self.grid.finetune.set, **section.set, **variant.set}),
            f"finetune.pauses={which.m_ft}",
            f"run.seed={which.seed}",
        )
        model = self.models[variant.model]
        config = _finetuning_config(which.task, recipe, overrides, model.config)
        if model.spent and model.spent.longer != 1:
            overrides = (*overrides, _longer(config, model.spent.longer))
            config = _finetuning_config(which.task, recipe, overrides, model.config)
        name = f"finetune-{variant.model}-{which.task}-m{which.m_ft}{_marks(variant.set)}-s{which.seed}"
        folder = () if records.folder is None else as_overrides({"task.path": records.folder})
        file = config.task.scores
        scores = {} if file is None else {"scores": self.inputs.scores.get(file, NOT_READ)}
        rows = self.inputs.vocabulary + config.pause.embeddings
        per_token = flops_per_token(config.model, rows, config.data.sequence_length)
        return Cell(
            name.replace("..", "to"),
            "finetune",
            (
                *(("--recipe", recipe) if recipe else ()),
                *overrides,
                f"model.from={INPUT}",
                *folder,
                f"run.dir={OUTPUT}",
            ),
            {"config": _plain(digest_keys(config)), "records": records.train, **scores},
            pretrained,
            Estimate(config.train.steps, config.train.tokens, per_token),
        )

    def _evaluate(
        self, which: Combination, exported: Cell, m_inf: tuple[int, ...], held_out: float | None = None
    ) -> Cell:
        """Return the cell that scores a model, on the held-out part of train if its fraction is given."""
        grid, section = self.grid, self.grid.tasks[which.task]
        variant = grid.variants[which.variant]
        inference, config = variant.inference, self.models[variant.model].config
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
        rows = self.inputs.vocabulary + config.pause.embeddings
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
            # The forward pass is a third. The number of tokens depends on the records' lengths and is unknown here.
            Estimate(flops_per_token=flops_per_token(config.model, rows, 0) / 3),
        )


def _finetuning_config(
    task: str, recipe: str | None, overrides: tuple[str, ...], model: ResolvedConfig
) -> ResolvedConfig:
    """Return the configuration that a finetuning will resolve to when its initial checkpoint exists.

    Args:
        task: Name of the task in the grid, for messages.
        recipe: Recipe of the finetuning.
        overrides: KEY=VALUE overrides.
        model: Configuration of the pretraining, from which missing keys are inherited.
    """
    given = {override.partition("=")[0] for override in overrides}
    if recipe is not None:
        path = recipe_path(recipe)
        given |= {entry.path for entry in read_entries(path.read_text(encoding="utf-8"), str(path))}
    inherited = {key: value for key, value in deciding_keys(model).items() if key in _INHERITED and key not in given}
    try:
        return load(recipe=recipe, overrides=(*as_overrides({"model.preset": None, **inherited}), *overrides))
    except ConfigError as error:
        raise ConfigError(f"tasks.{task}: {error}") from None


def _longer(config: ResolvedConfig, factor: float) -> str:
    """Return the override that multiplies the length of a finetuning."""
    if config.finetune.epochs is not None:
        return f"finetune.epochs={config.finetune.epochs * factor:.6g}"
    return f"train.steps={round((config.train.steps or 0) * factor)}"


def _export(finetuned: Cell) -> Cell:
    return Cell(finetuned.name.replace("finetune", "export", 1), "export-hf", (INPUT, OUTPUT), {}, finetuned)


def _held_out(grid: Grid, which: Combination) -> float | None:
    """Return the held-out fraction of train where the variant has several M_ft or M_inf to choose from; else None."""
    variant, section = grid.variants[which.variant], grid.tasks[which.task]
    of_m_ft = 1 if variant.finetune == "standard" else len(variant.pauses or section.pauses)
    if of_m_ft == 1 and len(_own_pauses(variant, which.m_ft)) == 1:
        return None
    default = TaskSection.model_fields["held_out"].default
    found = {**grid.finetune.set, **section.set, **variant.set}.get("task.held_out", default)
    return found if isinstance(found, float) and found else None


def _own_pauses(variant: Variant, m_ft: Pauses) -> tuple[int, ...]:
    """Return the M_inf of a variant."""
    return variant.inference.pauses or (highest(m_ft),)


def _all_pauses(grid: Grid, name: str, task: str, m_ft: Pauses) -> tuple[int, ...]:
    """Return every M_inf of a combination: the variant's own, and those of its curves."""
    pauses = set(_own_pauses(grid.variants[name], m_ft))
    for curve in grid.curves:
        of_task = curve.tasks is None or task in curve.tasks
        of_m_ft = curve.m_ft is None or str(m_ft) in map(str, curve.m_ft)
        if name in curve.variants and of_task and of_m_ft:
            pauses |= set(curve.pauses)
    return tuple(sorted(pauses))


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
