"""From a declaration's words to numbers: sizes, steps, parameters and FLOPs of each setting."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pause_megatron.config import load
from pause_megatron.config.batching import pause_range
from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.config.presets import flops_per_token, parameters
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.supervised.examples import encode_examples
from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
from pause_megatron.errors import ConfigError
from pause_megatron.tasks import load_task

from .declaration import EQUAL_FLOPS, EQUAL_PARAMETERS, EQUAL_STEPS, Declaration

LARGEST = {"model.ffn": 4096, "model.hidden": 1024, "model.layers": 64, "model.loops": 64}
SMALLEST = {"model.ffn": 1, "model.hidden": 8, "model.layers": 1, "model.loops": 1}

LOOKED_AT = 256

QUIET = {
    "data.prefetch": 0,
    "model.preset": None,
    "task.held_out": 0,
    "finetune.batching": "padded",
    "checkpoint.every": 0,
    "validation.every": 0,
    "log.every": 1_000_000,
    "log.tensorboard": False,
}
"""Keys of every run that change no result, or that no setting may change: all of the training split is trained on."""


@dataclass(frozen=True)
class Texts:
    """What is known of a task before anything is trained.

    Attributes:
        positions: input tokens of a training example without pauses; a longer one is refused when it is trained on.
        vocabulary: ids without pauses.
    """

    positions: int
    vocabulary: int


@dataclass(frozen=True)
class Plan:
    """A setting in numbers.

    Attributes:
        config: keys of its runs, but for seed, learning rate and folder.
        steps: of training.
        parameters: of the model.
        example_flops: of forward and backward pass of one example.
        flops: of the whole training.
        window: positions of an example.
    """

    config: dict[str, Any]
    steps: int
    parameters: int
    example_flops: int
    flops: int
    window: int


def attribute(name: str) -> Any:
    """What "module:attribute" names."""
    module, _, member = name.partition(":")
    return getattr(importlib.import_module(module), member)


@lru_cache
def texts(task: str, tokenizer: str) -> Texts:
    """Encodes some of a task's training examples."""
    with tempfile.TemporaryDirectory() as folder:
        attribute(tokenizer)(folder)
        opened = load_tokenizer(folder)
    encoded = encode_examples(load_task(task).examples("train", None, LOOKED_AT), opened)
    return Texts(max(one.prompt.size + one.target.size - 1 for one in encoded), opened.vocab_size)


def plans(declaration: Declaration) -> dict[str, Plan]:
    """Every setting in numbers, in the order of the declaration."""
    return {name: plan_of(declaration, name) for name in declaration.settings}


def plan_of(declaration: Declaration, name: str) -> Plan:
    """A setting in numbers. A setting that asks another one's models has that one's plan.

    The subject's sizes and steps are given, all others follow: FLOPs are `flops_per_token` of all positions of an
    example, pauses included.
    """
    known = texts(declaration.task, declaration.tokenizer)
    subject = _plan(declaration, declaration.subject, known, None)
    trained = declaration.settings[name].trained or name
    return subject if trained == declaration.subject else _plan(declaration, trained, known, subject)


def overrides(values: dict[str, Any]) -> list[str]:
    """Keys and values as `load` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _plan(declaration: Declaration, name: str, known: Texts, subject: Plan | None) -> Plan:
    setting = declaration.settings[name]
    values = {**QUIET, "task.name": declaration.task, **declaration.config, **setting.config}
    words = {key: value for key, value in values.items() if value in (EQUAL_FLOPS, EQUAL_PARAMETERS)}
    first = {**values, **{key: declaration.config.get(key, SMALLEST[key]) for key in words}}
    config = _load(first, known)
    window = config.data.sequence_length
    vocabulary = known.vocabulary + config.pause.embeddings

    def cost(model: ResolvedModel) -> int:
        return window * flops_per_token(model, vocabulary, window)

    model = config.model
    for key, word in words.items():
        assert subject is not None
        sizes = ((value, model.model_copy(update={_field(key): value})) for value in _candidates(key, model))
        if word == EQUAL_FLOPS:
            first[key] = nearest(sizes, cost, subject.example_flops)
        else:
            first[key] = smallest(sizes, lambda model: parameters(model, vocabulary), subject.parameters, name)
        model = model.model_copy(update={_field(key): first[key]})
    example = cost(model)
    batch = config.batch.global_size
    steps = setting.steps
    if subject is not None:
        steps = equal_steps(subject.flops, example * batch) if steps == EQUAL_FLOPS else subject.steps
    assert isinstance(steps, int), EQUAL_STEPS
    first = {**first, "data.sequence_length": window}
    return Plan(first, steps, parameters(model, vocabulary), example, example * batch * steps, window)


def equal_steps(flops: int, step: int) -> int:
    """How many steps give as many FLOPs, to the nearest."""
    return max(1, round(flops / step))


def nearest(sizes: Iterable[tuple[int, ResolvedModel]], cost: Callable[[ResolvedModel], int], target: int) -> int:
    """The size whose cost is nearest to the target; of two, the smaller."""
    return min(sizes, key=lambda size: (abs(cost(size[1]) - target), size[0]))[0]


def smallest(
    sizes: Iterable[tuple[int, ResolvedModel]], count: Callable[[ResolvedModel], int], target: int, name: str
) -> int:
    """The smallest size that has at least as many parameters as the target.

    Raises:
        ConfigError: none has.
    """
    for value, model in sizes:
        if count(model) >= target:
            return value
    raise ConfigError(f"settings.{name}: expected a size with {target:,} parameters, got none")


def _candidates(key: str, model: ResolvedModel) -> range:
    step = 2 * model.heads if key == "model.hidden" else 1
    return range(max(SMALLEST[key], step), LARGEST[key] + 1, step)


def _field(key: str) -> str:
    return key.split(".")[1]


def _load(values: dict[str, Any], known: Texts) -> ResolvedConfig:
    pauses = pause_range(str(values.get("finetune.pauses", 0)))[-1]
    return load(
        None, overrides=overrides({**values, "data.sequence_length": known.positions + pauses, "train.steps": 1})
    )
