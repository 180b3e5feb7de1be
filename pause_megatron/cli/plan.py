"""`pause-megatron plan`: estimate memory, communication, time and cost of a run before it is submitted."""

from __future__ import annotations

import argparse
import json
import logging

from pause_megatron.cli import at_least, note
from pause_megatron.errors import ConfigError
from pause_megatron.files.paths import path_option

log = logging.getLogger(__name__)

HELP = "estimate memory, communication, days and GPU-hours of a run on a cluster"

EXIT_FITS = 0
EXIT_DOES_NOT_FIT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from pause_megatron.config.load import recipe_names
    from pause_megatron.plan import GPUS

    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="NAME", help=f"one of {', '.join(recipe_names())}")
    source.add_argument(
        "--config", type=path_option, metavar="FILE", help="a YAML file, for example a run's own config.yaml"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="override configuration keys: for example batch.micro_size=8",
    )
    parser.add_argument("--nodes", type=at_least(1), default=1, metavar="N", help="number of nodes; default: 1")
    parser.add_argument("--gpus-per-node", type=at_least(1), default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--gpu", default="h100", metavar="NAMES", help=f"one or several, with commas: {', '.join(GPUS)}; default: h100"
    )
    parser.add_argument("--mfu", type=float, metavar="F", help="MFU, excluding communication, 0 to 1")
    parser.add_argument(
        "--measured",
        type=path_option,
        metavar="FILE",
        help="JSON of `pause-megatron benchmark`; its MFU and memory replace the estimates",
    )
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="replace an assumption that the table lists"
    )
    parser.add_argument(
        "--vocab-size",
        type=at_least(1),
        metavar="N",
        help="text vocabulary size; default: the corpus's, the preset's, or 32000",
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON, in bytes and seconds")
    parser.epilog = "exit code: 0, or 2 when the run does not fit on one of the GPUs (remedies are listed)."


def run(args: argparse.Namespace) -> int:
    """Plan the run for each kind of GPU and print the plans.

    Args:
        args: Parsed options.

    Returns:
        0, or 2 where the run does not fit on one of them.

    Raises:
        ConfigError: The configuration does not load, or an option has a wrong value.
    """
    from pause_megatron.cli.support.dry_run import text_vocabulary
    from pause_megatron.config import load
    from pause_megatron.plan import Assumptions, Cluster, as_json, as_table, gpu_named, make_plan, measured_values

    given = _given(args)
    gpus = [gpu_named(name.strip()) for name in args.gpu.split(",")]
    config = load(args.config, recipe=args.recipe, overrides=args.overrides, notify=note)
    text_size, origin = text_vocabulary(config, args.vocab_size)
    plans = []
    for gpu in gpus:
        cluster, assumptions = Cluster(gpu, args.nodes, args.gpus_per_node), Assumptions.of(gpu)
        if args.measured:
            assumptions = measured_values(args.measured, config, cluster, assumptions, text_size=text_size)
        plans.append(make_plan(config, cluster, text_size=text_size, assumptions=assumptions.with_values(given)))
    print(json.dumps(as_json(plans), indent=2) if args.json else as_table(plans))
    log.info(f"vocabulary: {text_size:,} text tokens ({origin}) + {config.pause.embeddings} pause")
    if all(plan.fits for plan in plans):
        return EXIT_FITS
    names = ", ".join(plan.cluster.gpu.name for plan in plans if not plan.fits)
    log.info(f"does not fit on {names}")
    return EXIT_DOES_NOT_FIT


def _given(args: argparse.Namespace) -> dict[str, float]:
    """Return the assumptions that the command line replaces."""
    changes = {}
    for text in args.assume:
        name, equals, value = text.partition("=")
        try:
            changes[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"--assume: expected NAME=NUMBER, got {text!r}")
    if args.mfu is not None:
        changes["mfu"] = args.mfu
    if changes.get("mfu", 0) > 1:
        raise ConfigError(f"--mfu: expected a fraction between 0 and 1, got {changes['mfu']}")
    return changes
