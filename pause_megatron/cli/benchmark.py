"""`pause-megatron benchmark`: time training steps of a configuration on this machine; nothing is saved."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from pause_megatron.cli import at_least, is_first_rank, note
from pause_megatron.distributed.agreement import failing_together
from pause_megatron.distributed.ranks import discover
from pause_megatron.errors import ConfigError
from pause_megatron.files.paths import path_option

log = logging.getLogger(__name__)

HELP = "time training steps of a configuration on this machine: tokens/s, MFU, memory, kernels, waits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from pause_megatron.config.load import recipe_names

    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(recipe_names())}")
    source.add_argument(
        "--config", type=path_option, metavar="FILE", help="a YAML file, for example a run's own config.yaml"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="override configuration keys, such as batch.global_size=32",
    )
    parser.add_argument("--steps", type=at_least(1), default=10, metavar="N", help="timed steps; default: 10")
    parser.add_argument(
        "--warmup", type=at_least(0), default=3, metavar="N", help="steps before the timed ones; default: 3"
    )
    parser.add_argument(
        "--json", type=path_option, metavar="FILE", help="write everything to FILE, in bytes and seconds"
    )
    parser.add_argument("--top", type=at_least(0), default=10, metavar="N", help="kernels to list; default: 10")
    parser.add_argument(
        "--vocab-size",
        type=at_least(1),
        metavar="N",
        help="vocabulary of the synthetic text; default: the corpus's, the preset's, or 32000",
    )
    parser.epilog = (
        "Windows hold synthetic text, unless data.prefix, data.source or a task is given; pauses are those of a run.\n"
        "Start it like a run: alone, or under torchrun, deepspeed or srun. Two more steps follow: one is profiled,\n"
        "one counts host synchronizations. batch.global_size=N shortens a step.\n\n"
        "exit code: 0, or 2 for a configuration, corpus or file that cannot be used."
    )


def run(args: argparse.Namespace) -> int:
    """Measure on all ranks; rank 0 prints and writes the result.

    Args:
        args: Parsed options.

    Raises:
        ConfigError: The configuration does not load, or the file cannot be written.
    """
    with failing_together("benchmark"):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from pause_megatron.cli.pretrain import silence_imports
    from pause_megatron.cli.support.dry_run import text_vocabulary
    from pause_megatron.config import load
    from pause_megatron.plan.layout import Layout

    config = load(args.config, recipe=args.recipe, overrides=args.overrides, notify=note)
    file = Path(args.json) if args.json and is_first_rank() else None
    if file is not None:
        _check_writable(file)
    text_size, _ = text_vocabulary(config, args.vocab_size)
    Layout.of(config, discover().world_size, text_size)  # raises where ranks, batch and engine contradict each other
    silence_imports()
    from pause_megatron.benchmark import Sizes, as_record, as_table, run_benchmark
    from pause_megatron.files.durable import write_whole

    measured = run_benchmark(config, Sizes(args.steps, args.warmup, args.top, text_size))
    if file is not None:  # before the table, whose pipe may be closed
        try:
            write_whole(file, json.dumps(as_record(measured), indent=2).encode())
        except OSError as error:
            raise _unwritable(file, error) from None
        log.info(f"written to {file}")
    if is_first_rank():
        print(as_table(measured), flush=True)
    return 0


def _check_writable(file: Path) -> None:
    from pause_megatron.files.durable import DigestFile

    if file.is_dir():
        raise ConfigError(f"--json: expected a file, got the folder {file}")
    try:
        DigestFile(file).discard()
    except OSError as error:
        raise _unwritable(file, error) from None


def _unwritable(file: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--json: expected a file that can be written, got {file}: {error.strerror}")
