"""Extending a finished run (`train.extended_from`): what may change at its end, and the command that extends it."""

from __future__ import annotations

import shlex

from pause_megatron.config.identity import LENGTH_KEYS, SCHEDULE_KEYS, corpus_names, deciding_keys
from pause_megatron.config.schema import ResolvedConfig, ScheduledConfig
from pause_megatron.errors import CheckpointError, ConfigError

_LENGTH_AND_SCHEDULE = frozenset({*LENGTH_KEYS, *SCHEDULE_KEYS})


def config_differences(before: ScheduledConfig, now: ScheduledConfig, step: int) -> list[str]:
    """Return a line for each key that affects the losses and differs although it must not.

    At the step where a finished run is extended, its length and its schedule may change. Inside the extension, as
    inside any run, nothing may.

    Args:
        before: Configuration of the checkpoint.
        now: Configuration of the run.
        step: Step of the checkpoint.

    Raises:
        CheckpointError: `train.extended_from` is not the step at which the checkpoint's run ended.
    """
    free: frozenset[str] = frozenset()
    extended = now.train.extended_from
    if extended is not None and extended != before.train.extended_from:
        _check_run_ended_at(extended, before, now, step)
        free = _LENGTH_AND_SCHEDULE
    return _differences(before, now, free)


def how_to_extend(before: ScheduledConfig, now: ScheduledConfig, step: int) -> str:
    """Return the last line of an error about more steps without `train.extended_from`: the command; else "".

    Args:
        before: Configuration of the checkpoint.
        now: Configuration of the run.
        step: Step of the checkpoint.
    """
    steps, asked = before.train.steps, now.train.steps
    if asked <= steps:
        return ""
    if _differences(before, now, _LENGTH_AND_SCHEDULE):
        return ""
    first = "" if step >= steps else f" finish it first ({_finish(before, now)}), then"
    return f"\nTo extend this run:{first} {_command(now, f'train.extended_from={steps}', _length(now))}"


def check_extends_nothing(config: ResolvedConfig) -> None:
    """Check that a run without a checkpoint is not asked to extend one.

    Args:
        config: Configuration of the run.

    Raises:
        ConfigError: `train.extended_from` is set.
    """
    extended = config.train.extended_from
    if extended is not None:
        raise ConfigError(
            f"train.extended_from={extended}: expected the checkpoint of step {extended:,} in "
            f"{config.run.dir}/checkpoints, got none. Give the run.dir of the finished run, or train.extended_from=null"
        )


def _check_run_ended_at(extended: int, before: ScheduledConfig, now: ScheduledConfig, step: int) -> None:
    steps = before.train.steps
    place = f"train.extended_from={extended}: expected the step at which the finished run ended"
    if step < steps:
        raise CheckpointError(
            f"{place}, got a run at step {step:,} of {steps:,}. Finish it first: {_finish(before, now)}"
        )
    if extended != steps:
        raise CheckpointError(f"{place}, {steps:,}. Give train.extended_from={steps}, and a train.steps above it")


def _differences(before: ScheduledConfig, now: ScheduledConfig, free: frozenset[str]) -> list[str]:
    old, new = deciding_keys(before), deciding_keys(now)
    lines = [
        f"{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} in this run"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and key not in free
    ]
    names = [corpus_names(config.data.prefix) for config in (before, now)]
    if now.pause.rate and names[0] != names[1]:
        lines.append(
            f"data.prefix: corpora named {' '.join(names[0])} in the checkpoint, {' '.join(names[1])} in this run: the "
            "name, with pause.seed, decides where the pauses are. Rename the files; their folder does not matter"
        )
    return lines


def _finish(before: ScheduledConfig, now: ScheduledConfig) -> str:
    """Return the command that trains a run to the end that its checkpoint names, in the folder where the run is now."""
    extended, old, new = before.train.extended_from, deciding_keys(before), deciding_keys(now)
    schedule = [f"{key}={old[key]}" for key in SCHEDULE_KEYS if old[key] != new[key]]
    extension = f"train.extended_from={'null' if extended is None else extended}"
    return _command(now, extension, _length(before), *schedule)


def _length(config: ResolvedConfig) -> str:
    epochs = config.finetune.epochs
    return f"train.steps={config.train.steps}" if epochs is None else f"finetune.epochs={epochs!r}"


def _command(config: ResolvedConfig, *overrides: str) -> str:
    verb = "pretrain" if config.task.name is None else "finetune"
    place = shlex.quote(f"{config.run.dir.rstrip('/')}/config.yaml")
    return f"pause-megatron {verb} --config {place} {' '.join(overrides)}"
