"""Values of a recipe that follow overrides: warm-up, micro-batch, sequence parallelism.

`--recipe R train.steps=10` has the recipe's warm-up, which may be longer than ten steps. The warm-up is then shortened,
with a note. Values that fit stay. Keys that were given together and contradict each other are refused by `rules`. Keys
that a finetuning does not use are noted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pause_megatron.config.batching import added_steps
from pause_megatron.config.pauses import BY_PATTERN
from pause_megatron.config.rules import micro_divides_global, sequence_needs_tensor, warmup_ends
from pause_megatron.config.schema import ResolvedConfig, RunConfig

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)

_OF_A_STEP = ("batch.global_size", "data.sequence_length")
_OF_A_SCHEDULE = ("optim.schedule", "optim.decay_fraction")
# Keys that decide how many windows an epoch of a task has.
_OF_AN_EPOCH = (
    *_OF_A_STEP,
    *(
        "finetune.pauses",
        "finetune.filler",
        "finetune.answer_placement",
        "finetune.answer_rate",
        "pause.run",
        "pause.pattern",
        "finetune.batching",
        "task.name",
        "task.path",
        "task.scores",
        "task.limit",
        "task.held_out",
    ),
)
_LENGTHS = ("train.steps", "train.tokens")
_OF_A_WARMUP = (*_LENGTHS, "train.extended_from", *_OF_A_STEP, *_OF_A_SCHEDULE)
_OF_PRETRAINING = ("pause.rate", "pause.window", "pause.placement", "pause.seed")
_SHARE = 10


@dataclass
class Sources:
    """The source of each key, and notes on the values that were adjusted.

    Attributes:
        later: Keys of the last source, the overrides.
        origin: "FILE:LINE" or "command line" of each key that was given.
        notes: One line for each value that was adjusted, or is not used.
    """

    later: frozenset[str]
    origin: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def follows(self, key: str, *others: str) -> bool:
        """Return whether one of `others` was given by a later source than `key`.

        Args:
            key: The key that may be adjusted.
            *others: Keys that it depends on.
        """
        return max(map(self._age, others)) > self._age(key)

    def note(self, change: str, *others: str) -> None:
        """Record an adjustment.

        Args:
            change: What was adjusted.
            *others: The keys that caused it.
        """
        because = ", ".join(f"{key} ({self.origin[key]})" for key in others if key in self.later or key in self.origin)
        self.notes.append(f"{change}; it follows {because}")

    def where(self, key: str) -> str:
        """Return the place of a key: "FILE:LINE", "command line" or "default".

        Args:
            key: Dotted path.
        """
        return self.origin.get(key, "default")

    def _age(self, key: str) -> int:
        return 2 if key in self.later else int(key in self.origin)


def note_unused(config: ResolvedConfig, sources: Sources, in_file: Collection[str]) -> None:
    """Note the keys of pretraining's pauses that were written for a finetuning, which does not use them.

    Keys that it takes from `model.from` are not noted, nor those of a run's own config.yaml, which has all keys.

    Args:
        config: Resolved configuration.
        sources: Where its keys were written; receives a note for each such key.
        in_file: Keys of the file or recipe.
    """
    answers = config.finetune.answer_placement
    unused = {key: "" for key in _OF_PRETRAINING}
    if answers is None:
        unused["pause.run"] = " without finetune.answer_placement"
    if answers not in BY_PATTERN:
        unused["pause.pattern"] = " without finetune.answer_placement after or before"
    written = sources.later if set(_OF_PRETRAINING) <= set(in_file) else {*sources.later, *in_file}
    for key, condition in unused.items() if config.task.name is not None else ():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if key in written and value != type(getattr(config, section)).model_fields[name].default:
            sources.notes.append(
                f"{key}={_yaml(value)} ({sources.where(key)}): a finetuning{condition} does not use it"
            )


def follow_epochs(config: RunConfig, sources: Sources) -> RunConfig:
    """Drop the steps of a finetuning's own config.yaml where an override changes the length of an epoch.

    To be called before steps and tokens are derived: that file has both beside the epochs they come from.

    Args:
        config: Keys as they were written.
        sources: Where they were written.
    """
    known = config.finetune.epochs is not None and config.train.steps is not None
    if known and all(sources.follows(key, *_OF_AN_EPOCH) for key in ("finetune.epochs", *_LENGTHS)):
        # No note yet: the examples decide whether the number changes.
        return _with(config, "train", steps=None, tokens=None)
    return config


def follow_values(config: ResolvedConfig, sources: Sources) -> ResolvedConfig:
    """Adjust warm-up, micro-batch and sequence parallelism that no longer fit.

    Args:
        config: Resolved configuration.
        sources: Where its keys were written; receives a note for each adjustment.
    """
    changes = (
        ("optim.warmup_steps", warmup_ends, fitting_warmup, _OF_A_WARMUP),
        ("batch.micro_size", micro_divides_global, _fitting_micro_size, ("batch.global_size",)),
        ("parallel.sequence", sequence_needs_tensor, lambda _: False, ("parallel.tensor",)),
    )
    for key, rule, fitting, others in changes:
        if rule(config) is not None and sources.follows(key, *others):
            section, name = key.split(".")
            old, new = getattr(getattr(config, section), name), fitting(config)
            config = _with(config, section, **{name: new})
            chosen = [other for other in others if sources.follows(key, other)]
            sources.note(f"{key}={_yaml(new)}, not {_yaml(old)} ({sources.where(key)})", *chosen)
    return config


def fitting_warmup(config: ResolvedConfig) -> int:
    """Return the warm-up steps of a run or extension that is too short for its own: a tenth, at least one of two steps.

    Args:
        config: Resolved configuration; where its number of steps is not known, its warm-up fits.
    """
    steps, optim = added_steps(config), config.optim
    if steps is None:
        return optim.warmup_steps
    room = steps - 1
    if optim.schedule == "wsd":
        room = min(room, int(steps * (1 - optim.decay_fraction)))
    return min(max(1, steps // _SHARE), room)


def _fitting_micro_size(config: ResolvedConfig) -> int:
    """Return the largest micro-batch up to the given one that divides the global batch."""
    whole = config.batch.global_size
    return max(size for size in range(1, config.batch.micro_size + 1) if whole % size == 0)


def _with(config: AnyConfig, section: str, **values: object) -> AnyConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
