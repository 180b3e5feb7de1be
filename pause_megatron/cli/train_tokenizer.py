"""pause-megatron train-tokenizer: shards of text -> a SentencePiece BPE model."""

from __future__ import annotations

import argparse
import sys
import time

from pause_megatron.cli.prepare import add_input_arguments, hub_options

HELP = "train a SentencePiece BPE tokenizer on shards of text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.epilog = (
        "example:\n  pause-megatron train-tokenizer --input 'shards/*.json.gz' --vocab-size 8192 --output tok.model\n\n"
        "<pause> is not put into the model: `prepare` reserves the id after its last piece."
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="pieces, the 256 byte pieces among them"
    )
    parser.add_argument("--output", required=True, metavar="FILE.model", help="the model")
    parser.add_argument("--max-documents", type=int, metavar="N", help="documents to train on, spread over the shards")
    parser.add_argument(
        "--max-bytes", type=int, default=200_000_000, metavar="N", help="bytes of text to train on (default: 200000000)"
    )
    parser.add_argument(
        "--split-digits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a piece for each digit of a number (default: yes)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")


def run(args: argparse.Namespace) -> int:
    """Train the tokenizer."""
    from pause_megatron.data.train_tokenizer import train_tokenizer

    print("reading documents and training; SentencePiece says nothing until it is done", file=sys.stderr)
    begun = time.perf_counter()
    trained = train_tokenizer(
        args.input,
        args.output,
        vocab_size=args.vocab_size,
        hub=hub_options(args),
        text_key=args.text_key,
        max_documents=args.max_documents,
        max_bytes=args.max_bytes,
        split_digits=args.split_digits,
        overwrite=args.overwrite,
    )
    seconds = time.perf_counter() - begun
    print(
        f"tokenizer {args.output}: {trained.tokenizer.vocab_size:,} pieces, BPE with byte fallback, trained on "
        f"{trained.documents:,} documents ({trained.text_bytes / 1e6:,.2f} MB) in {seconds:,.1f} s; "
        f"{trained.bytes_per_token:.2f} bytes per token"
    )
    if trained.malformed.total:
        print(f"malformed lines passed over: {trained.malformed.total:,}\n{trained.malformed.describe()}")
    return 0
