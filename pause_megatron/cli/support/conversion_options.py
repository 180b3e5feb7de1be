"""Options that imports and exports share."""

from __future__ import annotations

import argparse

from pause_megatron.cli import at_least


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """Declare the pause token, the tensor-parallel size, the window and the seed of an import.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument(
        "--pause-token",
        default="<pause>",
        metavar="NAME",
        help="special token of the tokenizer that serves as pause; its embedding row is kept (default: <pause>, added "
        "if missing)",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=at_least(1),
        default=1,
        metavar="N",
        help="tensor-parallel size of the checkpoint (default: 1)",
    )
    parser.add_argument(
        "--sequence-length", type=at_least(1), metavar="N", help="longest window (default: max_position_embeddings)"
    )
    parser.add_argument(
        "--seed", type=at_least(1), default=1234, metavar="N", help="seed of the pause row (default: 1234)"
    )


def add_comparison_option(parser: argparse.ArgumentParser) -> None:
    """Declare `--no-comparison`.

    Args:
        parser: Parser of the verb.
    """
    parser.add_argument(
        "--no-comparison",
        action="store_true",
        help="leave out the comparison with transformers at the end, which has the whole model in memory in fp32",
    )
