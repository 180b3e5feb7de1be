"""Time per byte against the length of a document: SentencePiece whole, the same in pieces, gigatoken. Same ids.

python -m tests.benchmarks.document_length [--rounds 7] [--model FILE]

Target: very long documents are no slower per byte than short ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, environment
from support.prose import documents, write_shards

from pause_megatron.data.tokenizer.fast.encoders import GigatokenEncoder
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.data.tokenizer.train import train_tokenizer

LENGTHS = (250, 1000, 4000, 16_000, 64_000, 250_000, 1_000_000, 4_000_000)
CHARACTERS = 1_000_000  # encoded in a call at least


def main() -> None:
    """Prints a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds, at least 7")
    parser.add_argument(
        "--model", type=Path, help="a SentencePiece BPE model (default: 8192 pieces trained on the text)"
    )
    arguments = parser.parse_args()
    text = "\n".join(documents(8000))
    with tempfile.TemporaryDirectory() as name:
        path = arguments.model or _train(Path(name))
        tokenizer = load_tokenizer(path)
        whole = sentencepiece.SentencePieceProcessor(model_file=str(path))
    print(f"ns per character of real speeches, {arguments.rounds} rounds, median; ratio to whole [quartiles]; same ids")
    print(f"   {environment('sentencepiece', 'gigatoken', 'numpy')}")
    for length in LENGTHS:
        starts = range(0, max(length, CHARACTERS), length)
        texts = [text[start : start + length] for start in starts]
        print(_line(length, texts, whole, tokenizer, arguments.rounds))


def _train(folder: Path) -> Path:
    pattern = write_shards(folder / "shards", documents(8000), 1)
    train_tokenizer([pattern], folder / "tok.model", vocab_size=8192)
    return folder / "tok.model"


def _line(
    length: int, texts: list[str], whole: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, rounds: int
) -> str:
    fast = GigatokenEncoder(tokenizer)
    expected = np.concatenate(whole.encode(texts, return_type="numpy", num_threads=1))
    for encoder in (tokenizer, fast):
        if not np.array_equal(encoder.encode_flat(texts).ids, expected):
            raise SystemExit(f"other ids at {length:,} characters")
    contestants: dict[str, Callable[[], object]] = {
        "whole": lambda: whole.encode(texts, return_type="numpy", num_threads=1),
        "in pieces": lambda: tokenizer.encode_flat(texts),
        "gigatoken": lambda: fast.encode_flat(texts),
    }
    characters = sum(map(len, texts))
    shown = [
        f"{name} {timing.seconds / characters * 1e9:6.1f}"
        + ("" if name == "whole" else f" ({timing.ratio:.2f} [{timing.low:.2f} .. {timing.high:.2f}])")
        for name, timing in compare(contestants, rounds).items()
    ]
    return f"   {length:9,} characters: " + ", ".join(shown)


if __name__ == "__main__":
    main()
