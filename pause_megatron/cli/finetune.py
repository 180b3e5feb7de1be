"""`pause-megatron finetune`: train a run on a task, or print its arithmetic (--dry-run)."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from pause_megatron.cli import note
from pause_megatron.cli.pretrain import add_run_arguments, handle_dry_run, refuse_dry_run_options, silence_imports
from pause_megatron.distributed.agreement import failing_together
from pause_megatron.errors import ConfigError

if TYPE_CHECKING:
    from pause_megatron.cli.pretrain import DeepSpeedConfig
    from pause_megatron.config.batching import BatchPlan
    from pause_megatron.config.schema import ResolvedConfig

HELP = "finetune a model on a task with pauses after the prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options, and list every configuration key at the end of --help.

    Args:
        parser: Parser of the verb.
    """
    from pause_megatron.config.load import recipe_names

    tasks = [name.removeprefix("finetune-") for name in recipe_names() if name.startswith("finetune-")]
    add_run_arguments(parser, recipes=f"finetune-TASK, where TASK is one of {', '.join(tasks)}")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without torch, then train.

    Args:
        args: The parsed command line.

    Returns:
        The exit code.
    """
    with failing_together("finetune"):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from pause_megatron.config import load
    from pause_megatron.terminal.output import tolerant_output
    from pause_megatron.train.guards.signals import stop_signals_until_exit

    config = load(args.config, recipe=args.recipe, overrides=args.overrides, notify=note)
    if config.task.name is None:
        raise ConfigError("task.name: expected a task to finetune on, got none (--recipe finetune-gsm8k names one)")
    if handle_dry_run(args, config, partial(_describe, config)):
        return 0
    refuse_dry_run_options(args, "world_size")
    # From here on signals make the run save and stop, and a failing stdout or stderr does not end it: the imports below
    # take seconds, and log.
    with tolerant_output(), stop_signals_until_exit() as stop:
        silence_imports()
        from pause_megatron.train.finetune import finetune

        return finetune(config, stop)


def _describe(config: ResolvedConfig, plan: BatchPlan, engine: DeepSpeedConfig) -> str:
    from pause_megatron.cli.support.dry_run import describe_task
    from pause_megatron.train.inputs.task_data import open_task

    return describe_task(open_task(config), plan, engine)
