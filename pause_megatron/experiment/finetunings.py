"""The finetuning runs of a grid, with their configuration resolved before their initial checkpoint exists."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.identity import deciding_keys
from pause_megatron.config.load import load, recipe_names, recipe_path
from pause_megatron.config.model_from import OF_A_TASK, PAUSES, SHAPE
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.config.text import read_entries
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.cell import SCORES
from pause_megatron.experiment.combinations import Combination
from pause_megatron.experiment.models import Pretraining, as_overrides
from pause_megatron.experiment.schema import Grid

# What a finetuning takes from its initial checkpoint, unless it is given.
_INHERITED = frozenset({*(f"model.{name}" for name in SHAPE), *PAUSES, *OF_A_TASK})


@dataclass(frozen=True)
class FinetuningRun:
    """A finetuning run.

    Attributes:
        recipe: Its recipe; None for none.
        overrides: KEY=VALUE overrides, without model.from, task.path and run.dir.
        config: The configuration that it will resolve to.
    """

    recipe: str | None
    overrides: tuple[str, ...]
    config: ResolvedConfig


def finetuning(grid: Grid, which: Combination, model: Pretraining) -> FinetuningRun:
    """Return the finetuning of a combination.

    Args:
        grid: The grid.
        which: The combination.
        model: Its pretraining, from which missing keys are inherited.

    Raises:
        ConfigError: A key does not fit.
    """
    section, variant = grid.tasks[which.task], grid.variants[which.variant]
    task = section.task or which.task
    recipe = section.recipe or (f"finetune-{task}" if f"finetune-{task}" in recipe_names() else None)
    scores = () if variant.scores is None else (f"task.scores={SCORES}",)
    more = (f"finetune.pauses={which.m_ft}", f"run.seed={which.seed}", *scores)
    overrides = (f"task.name={task}", *as_overrides(which.keys(grid)), *more)
    config = _resolved(which, recipe, overrides, model.config)
    if model.spent and model.spent.longer != 1:
        overrides = (*overrides, _longer(config, model.spent.longer))
        config = _resolved(which, recipe, overrides, model.config)
    return FinetuningRun(recipe, overrides, config)


def _resolved(
    which: Combination, recipe: str | None, overrides: tuple[str, ...], model: ResolvedConfig
) -> ResolvedConfig:
    """Return the configuration that a finetuning will resolve to when its initial checkpoint exists."""
    given = {override.partition("=")[0] for override in overrides}
    if recipe is not None:
        path = recipe_path(recipe)
        given |= {entry.path for entry in read_entries(path.read_text(encoding="utf-8"), str(path))}
    inherited = {key: value for key, value in deciding_keys(model).items() if key in _INHERITED and key not in given}
    try:
        return load(recipe=recipe, overrides=(*as_overrides({"model.preset": None, **inherited}), *overrides))
    except ConfigError as error:
        raise ConfigError(f"variants.{which.variant}: tasks.{which.task}: {error}") from None


def _longer(config: ResolvedConfig, factor: float) -> str:
    """Return the override that multiplies the length of a finetuning."""
    if config.finetune.epochs is not None:
        return f"finetune.epochs={config.finetune.epochs * factor:.6g}"
    return f"train.steps={round((config.train.steps or 0) * factor)}"
