"""`pause-megatron train-tokenizer`: train a SentencePiece BPE model on shards of text."""

from __future__ import annotations

import argparse
import sys
import threading
import time

from pause_megatron.cli.prepare import add_input_arguments, hub_options
from pause_megatron.files.paths import path_option

HELP = "train a SentencePiece BPE tokenizer on shards of text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = (
        "example:\n  pause-megatron train-tokenizer --input 'shards/*.json.gz' --vocab-size 8192 --output tok.model\n\n"
        "<pause> is not in the model: `prepare` reserves the id after its last piece."
    )
    add_input_arguments(parser)
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="number of pieces, the 256 byte pieces included"
    )
    parser.add_argument("--output", type=path_option, required=True, metavar="FILE.model", help="path of the model")
    parser.add_argument("--max-documents", type=int, metavar="N", help="limit of documents, spread over the shards")
    parser.add_argument(
        "--max-bytes", type=int, default=200_000_000, metavar="N", help="limit of bytes of text (default: 200000000)"
    )
    parser.add_argument(
        "--split-digits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make each digit a piece of its own (default: yes)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")


def run(args: argparse.Namespace) -> int:
    """Train the tokenizer and print a summary."""
    from pause_megatron.data.tokenizer.train import train_tokenizer

    begun = time.perf_counter()
    with _Clock() as clock:
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
            on_progress=clock.read,
        )
    seconds = time.perf_counter() - begun
    print(
        f"tokenizer {args.output}: {trained.tokenizer.vocab_size:,} pieces, BPE with byte fallback, trained on "
        f"{trained.documents:,} documents ({trained.text_bytes / 1e6:,.2f} MB) in {seconds:,.1f} s; "
        f"{trained.bytes_per_token:.2f} bytes per token in the first of them"
    )
    if trained.malformed.total:
        print(f"malformed lines skipped: {trained.malformed.total:,}\n{trained.malformed.describe()}")
    return 0


class _Clock:
    """A line on stderr with what was read and the time that has passed; SentencePiece itself reports no progress."""

    def __init__(self) -> None:
        from pause_megatron.terminal.progress import open_bar

        self._seconds = 0.5 if sys.stderr.isatty() else 10.0
        self._bar = open_bar(sys.stderr, "train-tokenizer", bar_format="{desc} {elapsed}{postfix}")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> _Clock:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self._bar.close()

    def read(self, documents: int, text_bytes: int) -> None:
        """Take note of what was read so far."""
        self._bar.set_postfix_str(f"{documents:,} documents, {text_bytes / 1e6:,.1f} MB read", refresh=False)

    def _tick(self) -> None:
        while not self._done.wait(self._seconds):
            self._bar.refresh()
