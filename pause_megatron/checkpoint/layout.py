"""How tensor parallelism cuts each parameter, and so how shards go together again.

Rows of a *merged* parameter are those of the same model at tensor-parallel size 1:

    embedding, output layer   consecutive ids; padding rows at the end
    linear_qkv                query groups one after the other, each with its queries, its key and its value
    linear_fc1 (SwiGLU)       the gate, then the up projection. A rank holds its part of the gate, then its part of the
                              up projection: shards laid end to end would interleave the two
    linear_proj, linear_fc2   cut by columns
    norms                     whole on every rank
"""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Parameters with a row per vocabulary id."""

_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_BY_ROWS = (
    "word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_fc1.weight",
)
_GATED = "linear_fc1.weight"


@dataclass(frozen=True)
class RowSpan:
    """Merged rows `[start, start + count)`, which tensor-parallel rank `rank` holds from its row `local` on."""

    rank: int
    local: int
    start: int
    count: int


def partition_dim(name: str) -> int | None:
    """Dimension along which a parameter is cut; None: every rank holds the whole."""
    if name.endswith(_BY_COLUMNS):
        return 1
    return 0 if name.endswith(_BY_ROWS) else None


def row_spans(name: str, rows: int, ranks: int) -> list[RowSpan]:
    """Where the merged rows of a parameter lie, ascending by merged row. Each is there once.

    Args:
        name: native parameter name
        rows: of the merged parameter; a multiple of `ranks` (of 2 x ranks for a gated layer) where it is cut by rows
        ranks: tensor-parallel size
    """
    if partition_dim(name) != 0:
        return [RowSpan(0, 0, 0, rows)]
    blocks = 2 if name.endswith(_GATED) else 1
    share = rows // (blocks * ranks)
    return [
        RowSpan(rank, block * share, (block * ranks + rank) * share, share)
        for block in range(blocks)
        for rank in range(ranks)
    ]


def shard_shape(name: str, merged: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Shape of one rank's shard of a parameter of merged shape `merged`."""
    cut = partition_dim(name)
    return tuple(size // ranks if dimension == cut else size for dimension, size in enumerate(merged))
