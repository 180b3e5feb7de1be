"""pause-megatron adopt: a corpus that Megatron-LM's preprocess_data.py made becomes one of ours."""

from __future__ import annotations

import argparse
import logging
import sys

from pause_megatron.files.paths import path_option, prefix_option

log = logging.getLogger(__name__)

HELP = "check a corpus that Megatron-LM's preprocess_data.py made, and write its manifest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.epilog = (
        "example:\n"
        "  pause-megatron adopt data/theirs_text_document --tokenizer tok.model\n\n"
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
        help="that they were made with: SentencePiece .model, tokenizer.json, folder, or hf:NAME",
    )
    parser.add_argument(
        "--eod-token", metavar="PIECE", help="piece that ends their documents (default: the tokenizer's eos)"
    )
    parser.add_argument(
        "--pause-id",
        type=int,
        metavar="ID",
        help="reserved id to use for <pause>, which the corpus does not hold (default: the tokenizer's <pause>, else "
        "the first id after the vocabulary)",
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
        help="share of the ids of 200 documents that must come back when their text is encoded again; less is taken "
        "for another tokenizer's (default: 0.9, or more where much comes back by chance)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a manifest that is there")
    parser.add_argument(
        "--cache",
        type=path_option,
        metavar="FOLDER",
        help="data.cache of the runs to come: the record there lets them start without reading the corpus again "
        "(default: 'cache' beside the corpus)",
    )


def run(args: argparse.Namespace) -> int:
    """Adopt the corpus."""
    from pause_megatron.data.adopt.adopt import adopt
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
        print(f"corpus {args.prefix} was adopted already: nothing to do")
        return 0
    record_as_read(open_corpus(args.prefix), args.cache, warn=log.warning)
    print(_summary(args.prefix, adopted))
    if not adopted.agreement.tells:
        log.warning(
            "this kind of tokenizer gives almost any ids back, so another one's would not have been noticed: see above "
            "whether the text reads well"
        )
    return 0


def _summary(prefix: str, adopted) -> str:
    manifest, agreement = adopted.manifest, adopted.agreement
    counts, record, adoption = manifest.counts, manifest.tokenizer, manifest.adoption
    size = sum(file.bytes for file in manifest.files.values()) / 1e6
    ended = counts.documents - adoption.without_eod
    lines = [
        f"corpus {prefix}: {counts.documents:,} documents, {counts.tokens:,} tokens ({manifest.dtype}); "
        f"{ended:,} end with EOD {record.eod}",
        f"tokenizer: {record.kind}, {record.vocab_size:,} ids, <pause> reserved as {record.pause_id}, which stands "
        "nowhere in it",
        f"agreement: {agreement.share:.1%} of the ids of {agreement.documents:,} documents come back when their text "
        f"is encoded again ({agreement.by_chance:.1%} by chance, in an arbitrary order)",
        f"it begins: {agreement.text!r}",
        f"time: {adopted.seconds:,.1f} s ({size / adopted.seconds:,.0f} MB/s)",
    ]
    if adoption.eod > ended:
        lines.insert(
            1,
            f"EOD inside documents: {adoption.eod - ended:,}; each ends a document with data.intra_document_masking",
        )
    if adopted.special:
        shown = [f"{token!r} {count:,} times" for token, count in list(adopted.special.items())[:_SHOWN]]
        more = f", and {len(adopted.special) - _SHOWN:,} others" if len(adopted.special) > _SHOWN else ""
        lines.insert(-1, f"special tokens in the text: {', '.join(shown)}{more}; does the corpus hold these?")
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
