"""`pause-megatron verify`: read corpora and side arrays whole and compare them with the digests of their manifests."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from pause_megatron.errors import DataError
from pause_megatron.files.paths import path_option, prefix_option

if TYPE_CHECKING:
    from pause_megatron.data.corpus.corpus import Corpus

log = logging.getLogger(__name__)

HELP = "read a corpus and its side arrays whole and compare them with the digests of its manifest"
EXIT_DAMAGED, EXIT_UNKNOWN = 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "prefixes",
        type=prefix_option,
        nargs="+",
        metavar="PREFIX",
        help="prefix of a corpus that `prepare` or `adopt` made",
    )
    parser.add_argument(
        "--cache",
        type=path_option,
        metavar="FOLDER",
        help="data.cache of future runs: the record there lets them start without reading the corpus again "
        "(default: 'cache' beside the corpus)",
    )
    parser.epilog = (
        "exit code: 0 if all corpora and side arrays match their manifests, 1 if one is damaged, else 2 if one is "
        "missing, unfinished or without a manifest"
    )


def run(args: argparse.Namespace) -> int:
    """Verify each corpus, also after a damaged one."""
    codes = [_verify(prefix, args.cache) for prefix in args.prefixes]
    return EXIT_DAMAGED if EXIT_DAMAGED in codes else max(codes)


def _verify(prefix: str, cache: str | None) -> int:
    import time

    from pause_megatron.data.corpus.corpus import open_corpus
    from pause_megatron.data.corpus.first_use import check_and_record
    from pause_megatron.data.corpus.manifest import path_of
    from pause_megatron.terminal.progress import StageProgress

    begun = time.perf_counter()
    try:
        corpus = open_corpus(prefix)
        with StageProgress(sys.stderr) as progress:
            damage = check_and_record(corpus, cache, report=progress.report, warn=log.warning)
    except DataError as error:
        known = path_of(prefix, "manifest.json").exists()
        print(f"{'DAMAGED' if known else 'UNKNOWN'}  {prefix}\n  {error}", flush=True)
        return EXIT_DAMAGED if known else EXIT_UNKNOWN
    if damage:
        print(f"DAMAGED  {prefix}", *damage, sep="\n  ", flush=True)
        return EXIT_DAMAGED
    counts, seconds = corpus.manifest.counts, time.perf_counter() - begun
    size = sum(record.bytes for record in corpus.manifest.files.values())
    print(
        f"whole    {prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens, {size / 1e6:,.1f} MB read in "
        f"{seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)",
        flush=True,
    )
    return max((_verify_side(corpus, name, cache) for name in corpus.manifest.sides), default=0)


def _verify_side(corpus: Corpus, name: str, cache: str | None) -> int:
    from pause_megatron.data.corpus.first_use import check_and_record
    from pause_megatron.data.corpus.side import find_side, side_path, summarize_side
    from pause_megatron.data.corpus.verify import raise_if_damaged
    from pause_megatron.terminal.progress import StageProgress

    try:
        side = find_side(corpus.prefix, name, corpus.manifest)
        with StageProgress(sys.stderr) as progress:
            raise_if_damaged(side, check_and_record(side, cache, report=progress.report, warn=log.warning))
        summary = summarize_side(side)
    except DataError as error:
        print(f"DAMAGED  {side_path(corpus.prefix, name)}\n  {error}", flush=True)
        return EXIT_DAMAGED
    print(f"whole    {side.path}: {summary}", flush=True)
    return 0
