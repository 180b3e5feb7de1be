"""`pause-megatron inspect`: show statistics of a corpus, and its windows with pauses."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from pause_megatron.cli import at_least
from pause_megatron.errors import ConfigError
from pause_megatron.files.paths import path_option, prefix_option

log = logging.getLogger(__name__)

HELP = "show what a corpus holds, and its windows with their pauses"

# Configuration keys that determine the windows; each is an option of the same name.
KEYS = (
    *("pause.rate", "pause.window", "pause.placement", "pause.seed", "pause.embeddings"),
    *("pause.run", "pause.pattern", "data.side", "data.sequence_length", "run.seed"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    from pause_megatron.config.keys import keys

    parser.epilog = "example: pause-megatron inspect data/c4 --sample 3 --pause.rate 0.2 --png c4.png"
    parser.add_argument(
        "prefix", type=prefix_option, metavar="PREFIX", help="prefix of a corpus that `prepare` or `adopt` made"
    )
    parser.add_argument(
        "--sample", type=at_least(0), action="append", default=[], metavar="N", help="show window N; may be repeated"
    )
    parser.add_argument(
        "--windows",
        type=at_least(0),
        default=200,
        metavar="N",
        help="number of windows for the pause statistics (default: 200)",
    )
    parser.add_argument("--png", type=path_option, metavar="FILE", help="write the histograms as a PNG")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object instead")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys as a run takes them: pause.rate=0.1")
    windows = parser.add_argument_group("windows, as in the configuration of a run")
    for key in KEYS:
        found = keys()[key]
        windows.add_argument(f"--{key}", metavar="VALUE", help=f"{found.expected}; default {found.default_text}")


def run(args: argparse.Namespace) -> int:
    """Print the report, and draw the figure if --png is given."""
    from pause_megatron.cli.pretrain import silence_imports
    from pause_megatron.config.load import load
    from pause_megatron.data.corpus.corpus import open_corpus

    given = {key: getattr(args, key) for key in KEYS if getattr(args, key) is not None}
    for override in args.overrides:
        if override.partition("=")[0] not in KEYS:
            raise ConfigError(f"command line: expected one of {', '.join(KEYS)}, got {override!r}")
    words = [*(f"{key}={value}" for key, value in given.items()), *args.overrides]
    side = next((word.partition("=")[2] for word in reversed(words) if word.startswith("data.side=")), None) or None
    placement = [word for word in words if word.startswith("pause.placement=")]
    if side and not any(word.endswith("=scored") or ":" in word for word in placement[-1:]):
        # Beside the configured policy, `scored` is shown, so a run's rule that the side array has a use does not hold.
        words = [word for word in words if not word.startswith("data.side=")]
    config = load(overrides=words)
    corpus = open_corpus(args.prefix)
    silence_imports()
    from pause_megatron.cli.support.inspect_report import CorpusReport
    from pause_megatron.data.windows.inspection import Windows, document_lengths, fertility

    corpus.tokenizer.check_pause_ids(config.pause.embeddings)
    windows = Windows(
        corpus,
        config.pause,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
        side=side,
        samples=max([args.windows, *(sample + 1 for sample in args.sample)]),
    )
    report = CorpusReport(
        corpus=corpus,
        lengths=document_lengths(corpus),
        fertility=fertility(corpus),
        config=config,
        policies=windows.policies([config.pause.placement]),
        windows=[windows.show(sample) for sample in args.sample],
    )
    print(report.as_json() if args.json else report.as_text(colour=sys.stdout.isatty()))
    if args.png:
        from pause_megatron.cli.support.inspect_figure import draw

        draw(Path(args.prefix).name, report.lengths, report.policies, Path(args.png))
        log.info(f"wrote {args.png}")
    return 0
