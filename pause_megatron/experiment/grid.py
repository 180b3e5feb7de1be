"""A grid -> the cells that it is made of, and what each evaluation stands for. Pure: starts and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pause_megatron.config.identity import deciding_keys
from pause_megatron.config.load import load, recipe_names, recipe_path
from pause_megatron.config.model_from import OF_A_TASK, PAUSES, SHAPE
from pause_megatron.config.presets import flops_per_token
from pause_megatron.config.renamed import with_old_names
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.config.text import read_entries
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.cell import INPUT, OUTPUT, Cell, Estimate
from pause_megatron.experiment.inputs import Inputs
from pause_megatron.experiment.models import Pretraining, as_overrides, resolve_models
from pause_megatron.experiment.schema import Grid, Pauses, Variant, highest

# What a finetuning takes from the checkpoint that it begins with, unless it is given.
_INHERITED = frozenset({*(f"model.{name}" for name in SHAPE), *PAUSES, *OF_A_TASK})


@dataclass(frozen=True)
class Point:
    """What an evaluate cell is of. Several points may share a cell.

    Attributes:
        m_ft: as the grid wrote it: "10", "0..50"; "0" with standard finetuning.
        m_inf: those that the variant stands for; further ones belong to curves.
    """

    variant: str
    task: str
    m_ft: str
    seed: int
    m_inf: tuple[int, ...]
    cell: Cell


@dataclass(frozen=True)
class Plan:
    """The cells of a grid, each once, inputs before those that need them; and the points."""

    cells: tuple[Cell, ...]
    points: tuple[Point, ...]


@dataclass
class _Cells:
    """Cells by fingerprint, in the order in which they were first asked for."""

    found: dict[str, Cell] = field(default_factory=dict)

    def shared(self, cell: Cell) -> Cell:
        """The cell, or the one of the same content that is there already."""
        return self.found.setdefault(cell.fingerprint, cell)


def expand(grid: Grid, inputs: Inputs) -> Plan:
    """All cells of a grid.

    Raises:
        ConfigError: a key of a run that does not fit, or cells of one name and different content.
    """
    models = resolve_models(grid, inputs.vocabulary)
    cells, points = _Cells(), []
    for name, task, m_ft, seed in combinations(grid):
        variant = grid.variants[name]
        model = models[variant.model]
        pretrained = cells.shared(_pretrain(variant.model, model, grid, inputs))
        finetuned = cells.shared(_finetune(grid, inputs, variant, model, task, m_ft, seed, pretrained))
        exported = cells.shared(_export(finetuned))
        m_inf = _all_pauses(grid, name, task, m_ft)
        scored = cells.shared(_evaluate(grid, inputs, variant, model, task, m_inf, seed, exported))
        points.append(Point(name, task, str(m_ft), seed, _own_pauses(variant, m_ft), scored))
    _refuse_equal_names(cells.found)
    return Plan(tuple(cells.found.values()), tuple(points))


def combinations(grid: Grid) -> Iterator[tuple[str, str, Pauses, int]]:
    """(variant, task, M_ft, seed), seeds outermost: an experiment that is stopped early has whole seeds."""
    for seed in grid.seeds:
        for name, variant in grid.variants.items():
            for task in variant.tasks or grid.tasks:
                pauses = (0,) if variant.finetune == "standard" else variant.pauses or grid.tasks[task].pauses
                for m_ft in pauses:
                    yield name, task, m_ft, seed


def _pretrain(name: str, model: Pretraining, grid: Grid, inputs: Inputs) -> Cell:
    train = model.config.train
    return Cell(
        f"pretrain-{name}",
        "pretrain",
        (*model.source, *model.overrides, *as_overrides({"data.prefix": grid.data.prefix}), f"run.dir={OUTPUT}"),
        {"config": _plain(with_old_names(deciding_keys(model.config))), "corpus": inputs.corpus},
        estimate=Estimate(train.steps, train.tokens, model.flops_per_token, model.parameters),
    )


def _finetune(
    grid: Grid, inputs: Inputs, variant: Variant, model: Pretraining, task: str, m_ft: Pauses, seed: int, begun: Cell
) -> Cell:
    section, records = grid.tasks[task], inputs.tasks[task]
    task_name = section.task or task
    recipe = section.recipe or (f"finetune-{task_name}" if f"finetune-{task_name}" in recipe_names() else None)
    keys = {**grid.finetune.set, **section.set, **variant.set}
    overrides = (
        f"task.name={task_name}",
        *as_overrides(keys),
        f"finetune.pauses={m_ft}",
        f"run.seed={seed}",
    )
    config = _finetuning_config(task, recipe, overrides, model.config)
    name = f"finetune-{variant.model}-{task}-m{m_ft}{_marks(variant.set)}-s{seed}"
    folder = () if records.folder is None else as_overrides({"task.path": records.folder})
    rows = inputs.vocabulary + config.pause.embeddings
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
        {"config": _plain(with_old_names(deciding_keys(config))), "records": records.train},
        begun,
        Estimate(
            config.train.steps,
            config.train.tokens,
            flops_per_token(config.model, rows, config.data.sequence_length),
        ),
    )


def _finetuning_config(
    task: str, recipe: str | None, overrides: tuple[str, ...], model: ResolvedConfig
) -> ResolvedConfig:
    """What a finetuning run will resolve to once its checkpoint is there: what is not given is the pretraining's."""
    given = {override.partition("=")[0] for override in overrides}
    if recipe is not None:
        path = recipe_path(recipe)
        given |= {entry.path for entry in read_entries(path.read_text(encoding="utf-8"), str(path))}
    before = {key: value for key, value in deciding_keys(model).items() if key in _INHERITED and key not in given}
    try:
        return load(recipe=recipe, overrides=(*as_overrides({"model.preset": None, **before}), *overrides))
    except ConfigError as error:
        raise ConfigError(f"tasks.{task}: {error}") from None


def _export(finetuned: Cell) -> Cell:
    return Cell(finetuned.name.replace("finetune", "export", 1), "export-hf", (INPUT, OUTPUT), {}, finetuned)


def _evaluate(
    grid: Grid,
    inputs: Inputs,
    variant: Variant,
    model: Pretraining,
    task: str,
    m_inf: tuple[int, ...],
    seed: int,
    exported: Cell,
) -> Cell:
    section, records, inference = grid.tasks[task], inputs.tasks[task], variant.inference
    limit = section.limit or grid.evaluate.limit
    task_name = section.task or task
    decides = {"--tasks": task_name, "--pauses": ",".join(map(str, m_inf)), "--limit": limit, "--seed": seed}
    decides |= {"--location": inference.location, "--filler": inference.filler}
    given = decides | {
        "--task-path": grid.data.tasks,
        "--batch-size": grid.evaluate.batch_size,
        "--device": grid.evaluate.device,
    }
    options = tuple(part for name, value in given.items() if value is not None for part in (name, str(value)))
    filler = "" if inference.filler is None else "-filler"
    place = "" if inference.location is None else f"-{inference.location}"
    curve = f"-curve{m_inf[0]}to{m_inf[-1]}" if len(m_inf) > 1 else f"-at{m_inf[0]}"
    rows = inputs.vocabulary + model.config.pause.embeddings
    return Cell(
        exported.name.replace("export", "evaluate", 1) + filler + place + curve,
        "evaluate",
        ("--model", INPUT, *options, "--output", OUTPUT),
        {
            "options": {name: value for name, value in decides.items() if value is not None},
            "records": records.evaluation,
        },
        exported,
        # Forward alone: a third. The lengths are the records' own, so tokens are known only afterwards.
        Estimate(flops_per_token=flops_per_token(model.config.model, rows, 0) / 3),
    )


def _own_pauses(variant: Variant, m_ft: Pauses) -> tuple[int, ...]:
    """The M_inf that a variant stands for."""
    return variant.inference.pauses or (highest(m_ft),)


def _all_pauses(grid: Grid, name: str, task: str, m_ft: Pauses) -> tuple[int, ...]:
    """Every M_inf of a point: the variant's own, and those of the curves that it belongs to."""
    wanted = set(_own_pauses(grid.variants[name], m_ft))
    for curve in grid.curves:
        of_task = curve.tasks is None or task in curve.tasks
        of_m_ft = curve.m_ft is None or str(m_ft) in map(str, curve.m_ft)
        if name in curve.variants and of_task and of_m_ft:
            wanted |= set(curve.pauses)
    return tuple(sorted(wanted))


def _marks(keys: Mapping[str, Any]) -> str:
    """Values of a variant's own keys, as part of a name: finetune.location=prepend -> "-prepend"."""
    marks = ("".join(c if c.isalnum() else "_" for c in str(value)) for value in keys.values())
    return "".join(f"-{mark}" for mark in marks)


def _plain(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON knows them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in keys.items()}


def _refuse_equal_names(cells: Mapping[str, Cell]) -> None:
    """Folders end in 8 digits of the fingerprint; two cells must not meet in one."""
    folders: dict[str, Cell] = {}
    for cell in cells.values():
        other = folders.setdefault(cell.folder_name, cell)
        if other is not cell:
            raise ConfigError(f"two different cells would share the folder {cell.folder_name}; rename a model or task")
