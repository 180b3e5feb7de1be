"""Going on behind the end of a finished run: when train.extended_from may follow a checkpoint, and how to type it."""

from __future__ import annotations

import shlex

from pause_megatron.config.identity import LENGTH_KEYS, SCHEDULE_KEYS, corpus_names, deciding_keys
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import CheckpointError, ConfigError


def config_differences(before: ResolvedConfig, now: ResolvedConfig, step: int) -> list[str]:
    """The keys that decide the losses, differ, and may not: one line each.

    At the step where a finished run is extended its length and its schedule may change; inside the extension, as inside
    any run, nothing may.

    Args:
        before: the checkpoint's configuration. now: the run's. step: after which the checkpoint was saved.

    Raises:
        CheckpointError: train.extended_from is not the step at which the checkpoint's run ended.
    """
    free = frozenset()
    extended = now.train.extended_from
    if extended is not None and extended != before.train.extended_from:
        _refuse_another_end(before, now, step)
        free = {*LENGTH_KEYS, *SCHEDULE_KEYS}
    return _lines(before, now, free)


def how_to_extend(before: ResolvedConfig, now: ResolvedConfig, step: int) -> str:
    """A last line for a refusal where more steps were asked for without train.extended_from, else nothing."""
    steps, asked = before.train.steps, now.train.steps
    if asked <= steps:
        return ""
    if _lines(before, now, {*LENGTH_KEYS, *SCHEDULE_KEYS}):
        return ""
    first = "" if step >= steps else f" finish it first ({_finish(before, now)}), then"
    return f"\nTo extend this run:{first} {_command(now, f'train.extended_from={steps}', _length(now))}"


def refuse_extending_nothing(config: ResolvedConfig) -> None:
    """For a run that found no checkpoint.

    Raises:
        ConfigError: it would extend one.
    """
    extended = config.train.extended_from
    if extended is not None:
        raise ConfigError(
            f"train.extended_from={extended}: expected the checkpoint of step {extended:,} in "
            f"{config.run.dir}/checkpoints, got none. Give the run.dir of the finished run, or train.extended_from=null"
        )


def _refuse_another_end(before: ResolvedConfig, now: ResolvedConfig, step: int) -> None:
    extended, steps = now.train.extended_from, before.train.steps
    place = f"train.extended_from={extended}: expected the step at which the finished run ended"
    if step < steps:
        raise CheckpointError(
            f"{place}, got a run that stands at step {step:,} of {steps:,}. Finish it first: {_finish(before, now)}"
        )
    if extended != steps:
        raise CheckpointError(f"{place}, {steps:,}. Give train.extended_from={steps}, and a train.steps above it")


def _lines(before: ResolvedConfig, now: ResolvedConfig, free: frozenset[str] | set[str]) -> list[str]:
    old, new = deciding_keys(before), deciding_keys(now)
    lines = [
        f"{key}: {old[key]!r} in the checkpoint, {new[key]!r} in this run"
        for key in new
        if old[key] != new[key] and key not in free
    ]
    names = [corpus_names(config.data.prefix) for config in (before, now)]
    if now.pause.rate and names[0] != names[1]:
        lines.append(
            f"data.prefix: corpora named {' '.join(names[0])} in the checkpoint, {' '.join(names[1])} in this run: the "
            "name, with pause.seed, decides where the pauses are. Rename the files; their folder does not matter"
        )
    return lines


def _finish(before: ResolvedConfig, now: ResolvedConfig) -> str:
    """The command that takes a run to the end that its checkpoint names, where its folder is now."""
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
