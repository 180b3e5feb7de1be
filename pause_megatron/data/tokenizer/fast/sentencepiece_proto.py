"""What a SentencePiece `.model` file holds: its pieces, their merges, and the pairs of characters that merges can join.

The rules are those of SentencePiece's BPE encoder: it begins with single characters and always joins the two
neighbours whose piece scores best, the leftmost among equals, until no two neighbours make a piece.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from pause_megatron.errors import DataError

SPACE = "▁"
BPE = 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
MODEL_TYPES = {1: "Unigram", BPE: "BPE", 3: "word", 4: "char"}


def parse_model(content: bytes, where: str) -> Any:
    """The `ModelProto` of a `.model` file.

    Args:
        content: its bytes.
        where: its name, for messages.

    Raises:
        DataError: not a SentencePiece model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise DataError(f"{where}: not a SentencePiece model ({error})") from None
    return model


def merges(pieces: Iterable[Any]) -> list[list[str]]:
    """Every way of making a normal piece of two others, best piece first.

    Pieces of the same score are runs of spaces, which SentencePiece grows from the left: so among equals the longer
    left part comes first.
    """
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for name, score in scores.items():
        found += [(-score, -len(left), -len(right), left, right) for left, right in _splits(name, scores)]
    found.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in found]


def joined_pairs(pieces: Iterable[Any]) -> frozenset[str]:
    """All pairs of characters that stand side by side in some piece, of whatever type."""
    return frozenset(left + right for piece in pieces for left, right in itertools.pairwise(piece.piece))


def _splits(name: str, known: dict[str, float]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(name)):
        left, right = name[:cut], name[cut:]
        # A single character is there even where the vocabulary lost it; then nothing can be merged from it.
        if left in known and right in known:
            yield left, right
