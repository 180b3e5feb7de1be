"""`pause-megatron pretrain`: train a run from a configuration, or print its arithmetic (--dry-run)."""

from __future__ import annotations

import argparse
import logging
import textwrap
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pause_megatron.cli import at_least, note
from pause_megatron.distributed.agreement import check_same_verb, failing_together
from pause_megatron.distributed.ranks import discover
from pause_megatron.errors import ConfigError
from pause_megatron.files.paths import path_option

if TYPE_CHECKING:
    from pause_megatron.config.batching import BatchPlan
    from pause_megatron.config.schema import ResolvedConfig

    DeepSpeedConfig = dict[str, Any]
    Describe = Callable[[BatchPlan, DeepSpeedConfig], str]

HELP = "pretrain a model on windows with pauses"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options, and list every configuration key at the end of --help.

    Args:
        parser: Parser of the verb.
    """
    from pause_megatron.config.load import recipe_names

    names = [name for name in recipe_names() if not name.startswith("finetune-")]
    add_run_arguments(parser, recipes=f"one of {', '.join(names)}")
    parser.add_argument(
        "--vocab-size",
        type=at_least(1),
        metavar="N",
        help="vocabulary for --dry-run; default: the corpus's, the preset's, or 32000",
    )


def add_run_arguments(parser: argparse.ArgumentParser, *, recipes: str) -> None:
    """Declare the options of every verb that trains.

    Args:
        parser: Parser of the verb.
        recipes: The recipes that ship for the verb, for --help.
    """
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="NAME", help=recipes)
    source.add_argument(
        "--config", type=path_option, metavar="FILE", help="a YAML file, for example a run's own config.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override configuration keys: for example optim.lr=3e-4"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="print the arithmetic of the run and stop; needs no GPU")
    parser.add_argument(
        "--world-size", type=at_least(1), metavar="N", help="ranks for --dry-run; default: the launcher's, or 1"
    )
    parser.epilog = _key_table()


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked without torch, then train.

    Args:
        args: The parsed command line.

    Returns:
        The exit code.
    """
    with failing_together("pretrain"):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from pause_megatron.config import load, scheduled
    from pause_megatron.terminal.output import tolerant_output
    from pause_megatron.train.guards.signals import stop_signals_until_exit

    config = load(args.config, recipe=args.recipe, overrides=args.overrides, notify=note)
    if config.task.name is not None:
        raise ConfigError(
            f"task.name={config.task.name}: expected a pretraining run, got a finetuning; start it with "
            "pause-megatron finetune"
        )
    if handle_dry_run(args, config, partial(_describe, config, args.vocab_size)):
        return 0
    refuse_dry_run_options(args, "world_size", "vocab_size")
    if not config.data.prefix and not config.data.source:
        raise ConfigError(
            "data.prefix: expected the prefix of a prepared corpus (see pause-megatron prepare), got none; or text to "
            "stream in data.source"
        )
    scheduled(config)
    # From here on signals make the run save and stop, and a failing stdout or stderr does not end it: the imports below
    # take seconds, and log.
    with tolerant_output(), stop_signals_until_exit() as stop:
        silence_imports()
        from pause_megatron.data.corpus.corpora import open_corpora
        from pause_megatron.hf.exportable import check_exportable
        from pause_megatron.train.pretrain import pretrain

        check_exportable(config, lambda: open_corpora(config.data, config.pause.embeddings).tokenizer)
        return pretrain(config, stop)


def _describe(config: ResolvedConfig, vocab_size: int | None, plan: BatchPlan, engine: DeepSpeedConfig) -> str:
    from pause_megatron.cli.support.dry_run import describe

    return describe(config, plan, engine, vocab_size=vocab_size)


def handle_dry_run(args: argparse.Namespace, config: ResolvedConfig, describe: Describe) -> bool:
    """Print on the first rank what --print-config or --dry-run ask for.

    Args:
        args: The parsed command line.
        config: Configuration of the run.
        describe: Returns the arithmetic of a run, from its batches and its DeepSpeed configuration.

    Returns:
        Whether one of the options was given.

    Raises:
        ConfigError: Batch sizes or DeepSpeed settings contradict each other, or code of the user cannot be used (not
            checked by --print-config).
    """
    from pause_megatron.config import batch_plan, deepspeed_config, dump

    ranks = discover()
    if args.print_config:
        if ranks.rank == 0:
            print(dump(config), end="")
        check_same_verb("--print-config")
        return True
    plan = batch_plan(config, args.world_size or ranks.world_size)
    engine = deepspeed_config(config, data_parallel=plan.data_parallel)
    if not args.dry_run:
        return False
    from pause_megatron.cli.support.user_code import check_user_code

    check_user_code(config)
    if ranks.rank == 0:
        print(describe(plan, engine), flush=True)
    check_same_verb("--dry-run")
    return True


def refuse_dry_run_options(args: argparse.Namespace, *options: str) -> None:
    """Check that no option of --dry-run is given to a run.

    Args:
        args: The parsed command line.
        options: Names of the options, with underscores.

    Raises:
        ConfigError: One of them is given.
    """
    for option in options:
        if getattr(args, option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')} belongs to --dry-run; a run takes it from the launcher or the corpus"
            )


def silence_imports() -> None:
    """Filter the warnings of libraries about missing packages; `pause-megatron doctor` reports what is missing."""
    for message in (
        ".*Apex (is|are) not installed",
        "The following imports from `dynamic_context.py`",
        "full scope is deprecated",
        "`torch.distributed.*` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
    # A CUDA toolkit without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _key_table() -> str:
    """Return every key with its type, range, default and meaning, in the order of the schema."""
    from pause_megatron.config.keys import keys, sections

    lines = ["configuration keys (KEY=VALUE, or in the YAML file as groups):"]
    lines.append("  Keys must be equal on every rank. Keys marked local may differ but must refer to the same content.")
    for section, cls in sections().items():
        lines += ["", f"  {section}: {(cls.__doc__ or '').splitlines()[0]}"]
        for key in keys().values():
            if key.path.startswith(f"{section}."):
                values = f"{key.expected}; default {key.default_text}{'; local' * key.local}"
                for text, first in ((values, f"    {key.path:26} "), (key.description, " " * 31)):
                    lines += textwrap.wrap(
                        text, 112, initial_indent=first, subsequent_indent=" " * 31, break_on_hyphens=False
                    )
    return "\n".join(lines)
