"""`pause-megatron prepare`: tokenize shards of text into a corpus."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pause_megatron.files.paths import path_option, pattern_option, prefix_option

if TYPE_CHECKING:
    from pause_megatron.data.text.hub import HubOptions

ENCODERS = ("auto", "library", "gigatoken")  # as in data.tokenizer.fast.encoders, too slow to import for --help
HELP = "turn shards of text into a tokenized corpus (.bin, .idx, manifest)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "examples:\n"
        "  pause-megatron prepare --input 'shards/*.json.gz' --tokenizer tok.model --output data/c4\n"
        "  pause-megatron prepare --input hf:allenai/c4 --hf-config en --tokenizer tok.model --output data/c4\n\n"
        "After an interruption, the same command resumes from the finished shards.\n"
        "Needs disk space for the corpus (2 bytes per token, 4 with more than 65,536 ids) plus its largest shard."
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        type=path_option,
        required=True,
        metavar="PATH",
        help="SentencePiece .model, tokenizer.json, folder, or hf:NAME",
    )
    parser.add_argument(
        "--output",
        type=prefix_option,
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin, .idx, .manifest.json, .tokenizer/",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes, one shard each (default: number of cores)")
    parser.add_argument(
        "--encoder",
        choices=ENCODERS,
        default="auto",
        help="tokenization library; the ids are the same: the tokenizer's own library, or the faster gigatoken; auto: "
        "gigatoken where it is installed and proven for the tokenizer (default: auto)",
    )
    parser.add_argument(
        "--eod-token", metavar="PIECE", help="token that ends a document (default: the tokenizer's eos)"
    )
    parser.add_argument(
        "--pause-id",
        type=int,
        metavar="ID",
        help="reserved id to use for <pause> (default: the first id after the vocabulary)",
    )
    parser.add_argument(
        "--max-malformed",
        type=_limit,
        default=1000,
        metavar="N",
        help="limit of malformed lines, which are left out: a number, or a fraction such as 0.001 (default: 1000)",
    )
    parser.add_argument(
        "--damaged-shards",
        choices=("error", "keep"),
        default="error",
        help="damaged shard, such as a truncated gzip: stop, or keep the readable part and count it as malformed "
        "(default: error)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus with other sources or options")
    parser.add_argument("--verify", action="store_true", help="read the finished corpus and check its digests")


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the documents to read, which `train-tokenizer` has too."""
    parser.add_argument(
        "--input",
        type=pattern_option,
        required=True,
        nargs="+",
        metavar="SHARD",
        help="shards of JSON lines (.json, .jsonl, .ndjson, plain, .gz or .zst), paths or globs; or hf:NAME, a "
        "Hugging Face dataset that is streamed",
    )
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="key of the text in each JSON object (default: text)"
    )
    hub = parser.add_argument_group("with --input hf:NAME")
    hub.add_argument("--hf-config", metavar="NAME", help="configuration of the dataset, such as 'en'")
    hub.add_argument("--hf-split", default="train", metavar="NAME", help="split (default: train)")
    hub.add_argument("--hf-revision", metavar="REV", help="branch, tag or commit")
    hub.add_argument(
        "--hf-data-files",
        type=pattern_option,
        nargs="+",
        default=(),
        metavar="FILE",
        help="files for a loader such as hf:json",
    )


def hub_options(args: argparse.Namespace) -> HubOptions:
    """Return the part of a dataset that the input options name."""
    from pause_megatron.data.text.hub import HubOptions

    return HubOptions(
        config=args.hf_config, split=args.hf_split, revision=args.hf_revision, data_files=tuple(args.hf_data_files)
    )


def run(args: argparse.Namespace) -> int:
    """Prepare the corpus and print a summary."""
    from pause_megatron.cli.support.prepare_progress import PrepareBar
    from pause_megatron.data.corpus.corpus import open_corpus
    from pause_megatron.data.corpus.first_use import check_and_record
    from pause_megatron.data.corpus.verify import raise_if_damaged
    from pause_megatron.data.prepare.run import prepare, summary
    from pause_megatron.data.text.sources import ReadOptions
    from pause_megatron.data.tokenizer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer, eod_token=args.eod_token, pause_id=args.pause_id)
    with PrepareBar(sys.stderr) as bar:
        prepared = prepare(
            args.input,
            tokenizer,
            args.output,
            hub=hub_options(args),
            options=ReadOptions(text_key=args.text_key, damaged_shards=args.damaged_shards),
            workers=args.workers,
            encoder=args.encoder,
            max_malformed=args.max_malformed,
            overwrite=args.overwrite,
            on_progress=bar.update,
        )
    print(summary(prepared, args.output))
    if args.verify:
        corpus = open_corpus(args.output)
        raise_if_damaged(corpus, check_and_record(corpus))
        print("verified: .bin and .idx have the digests of the manifest")
    return 0


def _limit(text: str) -> int | float:
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number of lines or a fraction, got {text!r}") from None
