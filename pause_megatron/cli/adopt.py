"""`pause-megatron adopt`: check a corpus of Megatron-LM's preprocess_data.py and write its manifest."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from pause_megatron.files.paths import path_option, prefix_option

if TYPE_CHECKING:
    from pause_megatron.data.adopt.run import Adopted
    from pause_megatron.data.adopt.tokenizer_check import Agreement

log = logging.getLogger(__name__)

HELP = "check a corpus that Megatron-LM's preprocess_data.py made, and write its manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "example:\n"
        "  pause-megatron adopt data/my_text_document --tokenizer tok.model\n\n"
        "Reads PREFIX.bin and PREFIX.idx whole and writes PREFIX.tokenizer/ and PREFIX.manifest.json beside them."
    )
    parser.add_argument(
        "prefix", type=prefix_option, metavar="PREFIX", help="prefix of the .bin and .idx, which are never written to"
    )
    parser.add_argument(
        "--tokenizer",
        type=path_option,
        required=True,
        metavar="PATH",
        help="tokenizer that encoded the corpus: SentencePiece .model, tokenizer.json, folder, or hf:NAME",
    )
    parser.add_argument(
        "--eod-token", metavar="PIECE", help="token that ends a document (default: the tokenizer's eos)"
    )
    parser.add_argument(
        "--pause-id",
        type=int,
        metavar="ID",
        help="reserved id to use for <pause>, which must not occur in the corpus (default: the tokenizer's <pause>, "
        "else the first id after the vocabulary)",
    )
    parser.add_argument(
        "--missing-eod",
        choices=("error", "keep"),
        default="error",
        help="documents that do not end with EOD (preprocess_data.py without --append-eod): stop, or keep and count "
        "them (default: error)",
    )
    parser.add_argument(
        "--min-agreement",
        type=_fraction,
        metavar="F",
        help="minimum fraction of the ids of 200 documents that decoding and encoding must reproduce; less means "
        "another tokenizer (default: 0.9, or more where much is reproduced by chance)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing manifest")
    parser.add_argument(
        "--cache",
        type=path_option,
        metavar="FOLDER",
        help="data.cache of future runs: the record there lets them start without reading the corpus again "
        "(default: 'cache' beside the corpus)",
    )


def run(args: argparse.Namespace) -> int:
    """Adopt the corpus and print a summary."""
    from pause_megatron.data.adopt.run import adopt
    from pause_megatron.data.corpus.corpus import open_corpus
    from pause_megatron.data.corpus.first_use import record_as_read
    from pause_megatron.data.tokenizer.tokenizer import load_tokenizer
    from pause_megatron.terminal.progress import StageProgress

    tokenizer = load_tokenizer(args.tokenizer, eod_token=args.eod_token, pause_id=args.pause_id)
    with StageProgress(sys.stderr) as progress:
        adopted = adopt(
            args.prefix,
            tokenizer,
            missing_eod=args.missing_eod,
            min_agreement=args.min_agreement,
            overwrite=args.overwrite,
            report=progress.report,
        )
    if adopted.agreement is None:
        print(f"corpus {args.prefix}: already adopted, nothing to do")
        return 0
    record_as_read(open_corpus(args.prefix), args.cache, warn=log.warning)
    print(_summary(args.prefix, adopted, adopted.agreement))
    if not adopted.agreement.conclusive:
        log.warning(
            "this kind of tokenizer reproduces almost any ids, so a wrong tokenizer would not be detected: check that "
            "the text above reads well"
        )
    return 0


def _summary(prefix: str, adopted: Adopted, agreement: Agreement) -> str:
    manifest = adopted.manifest
    counts, record = manifest.counts, manifest.tokenizer
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    ended = counts.documents - manifest.without_eod
    lines = [
        f"corpus {prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens ({manifest.dtype}); "
        f"{ended:,} end with EOD {record.eod}",
        f"tokenizer: {record.kind}, {record.vocab_size:,} ids, <pause> reserved as {record.pause_id}, which does "
        "not occur in it",
        f"agreement: {agreement.share:.1%} of the ids of {agreement.documents:,} documents are reproduced by decoding "
        f"and encoding ({agreement.by_chance:.1%} by chance, in random order)",
        f"it begins: {agreement.text!r}",
        f"time: {adopted.seconds:,.1f} s ({size / adopted.seconds:,.0f} MB/s)",
    ]
    if manifest.eod_count > ended:
        lines.insert(
            1,
            f"EOD inside documents: {manifest.eod_count - ended:,}; each is a boundary for data.intra_document_masking",
        )
    if adopted.special:
        shown = [f"{token!r} {count:,} times" for token, count in list(adopted.special.items())[:_SHOWN]]
        more = f", and {len(adopted.special) - _SHOWN:,} others" if len(adopted.special) > _SHOWN else ""
        lines.insert(-1, f"special tokens in the text: {', '.join(shown)}{more}; check that they belong there")
    return "\n".join(lines)


_SHOWN = 5


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value
