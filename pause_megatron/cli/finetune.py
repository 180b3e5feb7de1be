"""`pause-megatron finetune`: a task in, a run folder out; or its arithmetic (--dry-run)."""

from __future__ import annotations

import argparse

from pause_megatron.cli.pretrain import (
    add_run_arguments,
    is_first_rank,
    refuse_dry_run_options,
    silence_imports,
    world_size,
)
from pause_megatron.errors import ConfigError

HELP = "finetune a model on a task with pauses behind the prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options, and list every configuration key at the end of --help."""
    from pause_megatron.config.load import recipe_names

    tasks = [name.removeprefix("finetune-") for name in recipe_names() if name.startswith("finetune-")]
    add_run_arguments(parser, recipes=f"finetune-TASK, where TASK is one of {', '.join(tasks)}")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without torch, then train."""
    from pause_megatron.config import batch_plan, deepspeed_config, dump, load
    from pause_megatron.train.signals import listening_to_the_end

    config = load(args.config, recipe=args.recipe, overrides=args.overrides)
    if config.task.name is None:
        raise ConfigError("task.name: expected a task to finetune on, came none (--recipe finetune-gsm8k names one)")
    if args.print_config:
        if is_first_rank():
            print(dump(config), end="")
        return 0
    plan = batch_plan(config, world_size(args))
    engine = deepspeed_config(config, data_parallel=plan.data_parallel)
    if args.dry_run:
        from pause_megatron.cli.dry_run import describe_task
        from pause_megatron.train.task_data import open_task

        if is_first_rank():
            print(describe_task(open_task(config), plan, engine))
        return 0
    refuse_dry_run_options(args, "world_size")
    # From here on SIGTERM and SIGUSR2 make the run save and stop: the imports take long enough to be hit.
    with listening_to_the_end() as stop:
        silence_imports()
        from pause_megatron.train.finetune import finetune

        return finetune(config, stop)
