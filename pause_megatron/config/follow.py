"""Keys that nobody chose for this run follow those that somebody did.

A recipe fits together as it stands: its warm-up ends before its run does. Who asks for ten of its steps has not chosen
its warm-up, which would be refused beside them; here it becomes a shorter one, and that is said. Nothing else changes:
values that agree stay, and two keys that contradict each other and were given together are refused by `rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pause_megatron.config.batching import added_steps
from pause_megatron.config.rules import micro_divides_global, sequence_needs_tensor, warmup_ends
from pause_megatron.config.schema import ResolvedConfig, RunConfig

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)

_OF_A_STEP = ("batch.global_size", "data.sequence_length")
_OF_A_SCHEDULE = ("optim.schedule", "optim.decay_fraction")
# What decides how many windows an epoch of a task has.
_OF_AN_EPOCH = (
    *_OF_A_STEP,
    *("finetune.pauses", "finetune.filler", "finetune.batching", "task.name", "task.path", "task.limit"),
)
_LENGTHS = ("train.steps", "train.tokens")
_OF_A_WARMUP = (*_LENGTHS, "train.extended_from", *_OF_A_STEP, *_OF_A_SCHEDULE)
_SHARE = 10


@dataclass
class Sources:
    """Who gave which key, and what was changed because of it.

    Attributes:
        later: keys of the last source, the overrides
        origin: "FILE:LINE" or "command line" of every key that was given
        said: a line for each value that followed
    """

    later: frozenset[str]
    origin: Mapping[str, str]
    said: list[str] = field(default_factory=list)

    def follows(self, key: str, *others: str) -> bool:
        """Whether one of `others` was chosen after (a value for) `key` was."""
        return max(map(self._age, others)) > self._age(key)

    def tell(self, change: str, *others: str) -> None:
        """Note a change, and the keys behind it."""
        because = ", ".join(f"{key} ({self.origin[key]})" for key in others if key in self.later or key in self.origin)
        self.said.append(f"{change}; it follows {because}")

    def where(self, key: str) -> str:
        """ "FILE:LINE", "command line" or "default"."""
        return self.origin.get(key, "default")

    def _age(self, key: str) -> int:
        return 2 if key in self.later else int(key in self.origin)


def follow_epochs(config: RunConfig, sources: Sources) -> RunConfig:
    """Before steps and tokens are derived: a finetuning's own config.yaml has them beside the epochs they come from."""
    known = config.finetune.epochs is not None and config.train.steps is not None
    if known and all(sources.follows(key, *_OF_AN_EPOCH) for key in ("finetune.epochs", *_LENGTHS)):
        # Nothing to tell yet: the examples decide whether the number changes.
        return _with(config, "train", steps=None, tokens=None)
    return config


def follow_values(config: ResolvedConfig, sources: Sources) -> ResolvedConfig:
    """After that: warm-up, micro-batch and sequence parallelism that no longer fit."""
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
            sources.tell(f"{key}={_yaml(new)}, not {_yaml(old)} ({sources.where(key)})", *chosen)
    return config


def fitting_warmup(config: ResolvedConfig) -> int:
    """Warm-up for a run (or an extension) that is too short for its own: a tenth, at least a step where there are two.

    Args:
        config: its number of steps known
    """
    steps, optim = added_steps(config), config.optim
    room = steps - 1
    if optim.schedule == "wsd":
        room = min(room, int(steps * (1 - optim.decay_fraction)))
    return min(max(1, steps // _SHARE), room)


def _fitting_micro_size(config: ResolvedConfig) -> int:
    """The largest micro-batch, not above the given one, that divides the global batch."""
    whole = config.batch.global_size
    return max(size for size in range(1, config.batch.micro_size + 1) if whole % size == 0)


def _with(config: AnyConfig, section: str, **values: object) -> AnyConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
