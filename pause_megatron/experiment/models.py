"""The pretraining runs of a grid, with sizes and budgets derived from other runs."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pause_megatron.config.batching import batch_plan
from pause_megatron.config.load import load
from pause_megatron.config.presets import flops_per_token, parameters
from pause_megatron.config.schema import ResolvedConfig, ResolvedModel
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.schema import Budget, ExtraLayers, Grid, Keys, Model


@dataclass(frozen=True)
class Pretraining:
    """A pretraining run.

    Attributes:
        source: ("--recipe", NAME) or ("--config", FILE).
        overrides: KEY=VALUE overrides, without data.prefix and run.dir.
        config: The resolved configuration.
        flops_per_token: Model FLOPs of forward and backward pass of one raw token.
        parameters: Number of parameters of the model, pause rows included.
    """

    source: tuple[str, str]
    overrides: tuple[str, ...]
    config: ResolvedConfig
    flops_per_token: float
    parameters: int

    def with_layers(self, layers: int, vocabulary: int) -> Pretraining:
        """Return the run with another depth.

        Args:
            layers: Number of layers.
            vocabulary: Number of text tokens.
        """
        return pretraining(self.source, (*self.overrides, f"model.layers={layers}"), vocabulary)

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
    """Return a run with its depth and its budget.

    Args:
        section: The model in the grid.
        like: The run that its budget refers to.
        vocabulary: Number of text tokens.
    """
    source = ("--recipe", section.recipe) if section.recipe else ("--config", str(section.config))
    run = pretraining(source, as_overrides(section.set), vocabulary)
    if section.extra_layers:
        extra = count_extra_layers(run.config.model, section.extra_layers, vocabulary)
        run = run.with_layers(run.config.model.layers + extra, vocabulary)
    if section.budget and like is not None:
        run = run.with_tokens(_tokens(section.budget, run, like), vocabulary)
    _ = run.tokens  # refuses a run without a duration
    return run


def count_extra_layers(model: ResolvedModel, wanted: ExtraLayers, vocabulary: int) -> int:
    """Return how many extra layers cost as much on a prefix without pauses as the pauses after that prefix.

    It is the number (1 or more) with the nearest forward FLOPs. Goyal et al. compare 10 pauses after 100 tokens with 2
    layers in addition to 24.

    Args:
        model: The model without extra layers.
        wanted: Numbers of pauses and of prefix tokens.
        vocabulary: Number of text tokens.
    """
    length = wanted.prefix_tokens + wanted.pauses
    with_pauses = flops_per_token(model, vocabulary, length) * length

    def cost(layers: int) -> int:
        deeper = model.model_copy(update={"layers": layers})
        return flops_per_token(deeper, vocabulary, wanted.prefix_tokens) * wanted.prefix_tokens

    candidates = range(1, 2 * model.layers * wanted.pauses // wanted.prefix_tokens + 3)
    return min(candidates, key=lambda extra: abs(cost(model.layers + extra) - with_pauses))


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
