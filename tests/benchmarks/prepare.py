"""P6: `prepare` (gz in, .bin/.idx out) against the bare tokenizer and against megatron-core's loop, same text and ids.

python -m tests.benchmarks.prepare [--documents 8000] [--rounds 9] [--vocab-size 8192]

Targets: >= 0.9 of the bare tokenizer's rate per core; the fast byte-pair path >= 5x Hugging Face tokenizers with
identical ids; resident memory flat from 1x to 10x input. Everything starts cold in each call: models are opened anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8000, help="paragraphs of real speeches")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds, at least 7")
    parser.add_argument("--vocab-size", type=int, default=8192)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    # Here, because every process that a contestant starts reads this file again, and would import torch.
    from benchmarks.prepare_contest import contest

    contest(arguments.documents, arguments.rounds, arguments.vocab_size)


if __name__ == "__main__":
    main()
