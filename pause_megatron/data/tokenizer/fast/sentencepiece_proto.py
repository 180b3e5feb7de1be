"""Parser of SentencePiece `.model` files: pieces, merges, and pairs of characters that merges can join.

SentencePiece's BPE encoder begins with single characters. It always merges the two adjacent pieces whose merged piece
has the best score, the leftmost among equals, until no two adjacent pieces make a piece.
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
    """Return the `ModelProto` of a `.model` file.

    Args:
        content: Bytes of the file.
        where: Name of the file, for messages.

    Raises:
        DataError: The bytes are not a SentencePiece model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # generated at import by protobuf
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise DataError(f"{where}: expected a SentencePiece model, got other content ({error})") from None
    return model


def merges(pieces: Iterable[Any]) -> list[list[str]]:
    """Return every merge of two pieces into a normal piece, best piece first.

    Pieces of equal score are runs of spaces, which SentencePiece merges from the left. So among equals the longer left
    piece comes first.

    Args:
        pieces: Pieces of a `ModelProto`.

    Returns:
        Pairs [left, right].
    """
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for name, score in scores.items():
        found += [(-score, -len(left), -len(right), left, right) for left, right in _splits(name, scores)]
    found.sort(key=lambda merge: merge[:3])
    return [[left, right] for *_, left, right in found]


def joined_pairs(pieces: Iterable[Any]) -> frozenset[str]:
    """Return all pairs of adjacent characters in pieces of any type."""
    return frozenset(left + right for piece in pieces for left, right in itertools.pairwise(piece.piece))


def _splits(name: str, known: dict[str, float]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(name)):
        left, right = name[:cut], name[cut:]
        # A character that is not in the vocabulary cannot be merged.
        if left in known and right in known:
            yield left, right
