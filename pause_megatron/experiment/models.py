"""The pretraining runs of a grid, with sizes and budgets derived from other runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from pause_megatron.config.batching import batch_plan
from pause_megatron.config.load import load
from pause_megatron.config.presets import flops_per_token, parameters
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.extra import Spent, spend
from pause_megatron.experiment.schema import Budget, Grid, Keys, Model


@dataclass(frozen=True)
class Pretraining:
    """A pretraining run.

    Attributes:
        source: ("--recipe", NAME) or ("--config", FILE).
        overrides: KEY=VALUE overrides, without data.prefix and run.dir.
        config: The resolved configuration.
        flops_per_token: Model FLOPs of forward and backward pass of one raw token.
        parameters: Number of parameters of the model, pause rows included.
        spent: What it gets in place of pauses.
    """

    source: tuple[str, str]
    overrides: tuple[str, ...]
    config: ResolvedConfig
    flops_per_token: float
    parameters: int
    spent: Spent | None = None

    def with_tokens(self, tokens: int, vocabulary: int) -> Pretraining:
        """Return the run with another number of raw tokens in place of its own duration.

        Args:
            tokens: Number of raw tokens.
            vocabulary: Number of text tokens.
        """
        kept = [override for override in self.overrides if not override.startswith(("train.steps=", "train.tokens="))]
        return pretraining(self.source, (*kept, f"train.tokens={tokens}"), vocabulary)

    @property
    def tokens(self) -> int:
        """Raw tokens of the run.

        Raises:
            ConfigError: The configuration gives neither steps nor tokens.
        """
        if self.config.train.tokens is None:
            raise ConfigError("train.steps or train.tokens: expected one of them, got neither")
        return self.config.train.tokens

    @property
    def text_share(self) -> float:
        """Expected fraction of text among the raw tokens."""
        return 1 - batch_plan(self.config, self.config.parallel.tensor).pause_fraction


def pretraining(source: tuple[str, str], overrides: tuple[str, ...], vocabulary: int) -> Pretraining:
    """Return a run with its configuration resolved.

    Args:
        source: ("--recipe", NAME) or ("--config", FILE).
        overrides: KEY=VALUE overrides.
        vocabulary: Number of text tokens.

    Raises:
        ConfigError: A key does not fit.
    """
    kind, name = source
    config = load(name, overrides=overrides) if kind == "--config" else load(recipe=name, overrides=overrides)
    rows = vocabulary + config.pause.embeddings
    per_token = flops_per_token(config.model, rows, config.data.sequence_length)
    return Pretraining(source, overrides, config, per_token, parameters(config.model, rows))


def resolve_models(grid: Grid, vocabulary: int) -> dict[str, Pretraining]:
    """Return every pretraining run of a grid by its name.

    Args:
        grid: The grid.
        vocabulary: Number of text tokens.

    Raises:
        ConfigError: A key does not fit, or budgets refer to each other in a cycle.
    """
    done: dict[str, Pretraining] = {}

    def run_of(name: str, dependents: tuple[str, ...]) -> Pretraining:
        if name in dependents:
            cycle = " -> ".join([*dependents, name])
            raise ConfigError(f"models: expected budgets without a cycle, got {cycle}")
        if name not in done:
            section = grid.models[name]
            like = run_of(section.budget.like, (*dependents, name)) if section.budget else None
            try:
                done[name] = _resolve_model(section, like, vocabulary)
            except ConfigError as error:
                raise ConfigError(f"models.{name}: {error}") from None
        return done[name]

    return {name: run_of(name, ()) for name in grid.models}


def _resolve_model(section: Model, like: Pretraining | None, vocabulary: int) -> Pretraining:
    """Return a run with what it gets in place of pauses, and its budget.

    Args:
        section: The model in the grid.
        like: The run that its budget refers to.
        vocabulary: Number of text tokens.
    """
    source = ("--recipe", section.recipe) if section.recipe else ("--config", str(section.config))
    run = pretraining(source, as_overrides(section.set), vocabulary)
    spent = spend(run.config.model, section.extra, vocabulary) if section.extra else None
    if spent and spent.keys:
        run = pretraining(source, (*run.overrides, *as_overrides(spent.keys)), vocabulary)
    if section.budget and like is not None:
        run = run.with_tokens(_tokens(section.budget, run, like), vocabulary)
    if spent and spent.longer != 1:
        run = run.with_tokens(round(run.tokens * spent.longer), vocabulary)
    _ = run.tokens  # refuses a run without a duration
    return replace(run, spent=spent)


def as_overrides(keys: Keys) -> tuple[str, ...]:
    """Return keys of a grid as KEY=VALUE."""
    return tuple(f"{key}={_text(value)}" for key, value in keys.items())


def _text(value: object) -> str:
    """Return a value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(json.dumps(item, ensure_ascii=False) for item in value)}]"
    text = str(value)
    # Text that YAML would read as a list, a group or a quoted text is quoted.
    return json.dumps(text, ensure_ascii=False) if not text or text[0] in "[{'\"" else text


def _tokens(budget: Budget, run: Pretraining, like: Pretraining) -> int:
    """Return the raw tokens that give a run the budget of another one."""
    tokens = like.tokens
    if budget.equal == "total_tokens":
        return tokens
    if budget.equal == "text_tokens":
        return round(tokens * like.text_share / run.text_share)
    return round(tokens * like.flops_per_token / run.flops_per_token)
