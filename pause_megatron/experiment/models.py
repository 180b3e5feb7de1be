"""The pretraining runs of a grid, with sizes and lengths that follow from other runs worked out. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pause_megatron.config.batching import batch_plan
from pause_megatron.config.load import load
from pause_megatron.config.presets import flops_per_token, parameters
from pause_megatron.config.schema import ResolvedConfig, ResolvedModel
from pause_megatron.errors import ConfigError
from pause_megatron.experiment.schema import Budget, ExtraLayers, Grid, Keys


@dataclass(frozen=True)
class Pretraining:
    """A pretraining run.

    Attributes:
        source: ("--recipe", NAME) or ("--config", FILE).
        overrides: KEY=VALUE on top, without data.prefix and run.dir.
        config: what they resolve to.
        flops_per_token: forward and backward pass of one raw token.
        parameters: of the model, pause rows included.
    """

    source: tuple[str, str]
    overrides: tuple[str, ...]
    config: ResolvedConfig
    flops_per_token: float
    parameters: int

    def with_layers(self, layers: int, vocabulary: int) -> Pretraining:
        """The run with another depth."""
        return pretraining(self.source, (*self.overrides, f"model.layers={layers}"), vocabulary)

    def with_tokens(self, tokens: int, vocabulary: int) -> Pretraining:
        """The run over another number of raw tokens, whatever its own length was."""
        kept = [override for override in self.overrides if not override.startswith(("train.steps=", "train.tokens="))]
        return pretraining(self.source, (*kept, f"train.tokens={tokens}"), vocabulary)

    @property
    def text_share(self) -> float:
        """Expected share of text among the raw tokens."""
        return 1 - batch_plan(self.config, self.config.parallel.tensor).pause_fraction


def pretraining(source: tuple[str, str], overrides: tuple[str, ...], vocabulary: int) -> Pretraining:
    """Resolve a run.

    Raises:
        ConfigError: keys that do not fit.
    """
    kind, name = source
    config = load(name, overrides=overrides) if kind == "--config" else load(recipe=name, overrides=overrides)
    rows = vocabulary + config.pause.embeddings
    per_token = flops_per_token(config.model, rows, config.data.sequence_length)
    return Pretraining(source, overrides, config, per_token, parameters(config.model, rows))


def resolve_models(grid: Grid, vocabulary: int) -> dict[str, Pretraining]:
    """Every pretraining run of a grid, by its name.

    Args:
        vocabulary: text tokens.

    Raises:
        ConfigError: a key that does not fit, or budgets that refer to each other in a circle.
    """
    done: dict[str, Pretraining] = {}

    def resolve(name: str, waiting: tuple[str, ...]) -> Pretraining:
        if name in waiting:
            circle = " -> ".join([*waiting, name])
            raise ConfigError(f"models: expected budgets that begin with a model of its own length, got {circle}")
        if name not in done:
            section = grid.models[name]
            source = ("--recipe", section.recipe) if section.recipe else ("--config", str(section.config))
            try:
                run = pretraining(source, as_overrides(section.set), vocabulary)
            except ConfigError as error:
                raise ConfigError(f"models.{name}: {error}") from None
            if section.extra_layers:
                layers = run.config.model.layers + count_extra_layers(
                    run.config.model, section.extra_layers, vocabulary
                )
                run = run.with_layers(layers, vocabulary)
            if section.budget:
                like = resolve(section.budget.like, (*waiting, name))
                run = run.with_tokens(_tokens(section.budget, run, like), vocabulary)
            if run.config.train.tokens is None:
                raise ConfigError(f"models.{name}: train.steps or train.tokens: expected one of them, got neither")
            done[name] = run
        return done[name]

    return {name: resolve(name, ()) for name in grid.models}


def count_extra_layers(model: ResolvedModel, wanted: ExtraLayers, vocabulary: int) -> int:
    """Layers on top that cost, on a prefix without pauses, what the pauses cost the model behind that prefix.

    The number (1 or more) whose forward FLOPs come nearest. Goyal et al. make this comparison: 10 pauses behind 100
    tokens against 2 layers on top of 24.
    """
    length = wanted.prefix_tokens + wanted.pauses
    with_pauses = flops_per_token(model, vocabulary, length) * length

    def cost(layers: int) -> int:
        deeper = model.model_copy(update={"layers": layers})
        return flops_per_token(deeper, vocabulary, wanted.prefix_tokens) * wanted.prefix_tokens

    candidates = range(1, 2 * model.layers * wanted.pauses // wanted.prefix_tokens + 3)
    return min(candidates, key=lambda extra: abs(cost(model.layers + extra) - with_pauses))


def as_overrides(keys: Keys) -> tuple[str, ...]:
    """Keys of a grid as KEY=VALUE."""
    return tuple(f"{key}={_text(value)}" for key, value in keys.items())


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(json.dumps(item, ensure_ascii=False) for item in value)}]"
    text = str(value)
    # What YAML would read as a list, a group or a quotation is text in quotes; the rest stands as it is.
    return json.dumps(text, ensure_ascii=False) if not text or text[0] in "[{'\"" else text


def _tokens(budget: Budget, run: Pretraining, like: Pretraining) -> int:
    """Raw tokens that make a run as long as another one."""
    tokens = like.config.train.tokens
    if budget.equal == "total_tokens":
        return tokens
    if budget.equal == "text_tokens":
        return round(tokens * like.text_share / run.text_share)
    return round(tokens * like.flops_per_token / run.flops_per_token)
