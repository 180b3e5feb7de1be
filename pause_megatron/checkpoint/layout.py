"""How tensor parallelism shards each parameter: the rows of a merged parameter that each rank holds.

Rows of a *merged* parameter are those of the same model at tensor-parallel size 1:

    embedding, output layer   consecutive ids; padding rows at the end
    linear_qkv                query groups one after the other, each with its queries, its key and its value
    linear_fc1 (SwiGLU)       the gate, then the up projection. A rank holds its part of the gate, then its part of the
                              up projection: shards laid end to end would interleave the two
    linear_proj, linear_fc2   sharded by columns
    norms, auxiliary heads    whole on every rank
    lora_b of a matrix        sharded as its rows are
    lora_a of a matrix        sharded as its columns are
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pause_megatron.config.lora import LORA_A, LORA_B

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Parameters with a row per vocabulary id."""

_GATED = tuple(f"linear_fc1.{kind}" for kind in ("weight", "bias", LORA_B))
_BY_COLUMNS = tuple(f"linear_{name}.{kind}" for name in ("proj", "fc2") for kind in ("weight", LORA_A))
_BY_ROWS = (
    "word_embeddings.weight",
    "output_layer.weight",
    *(f"linear_qkv.{kind}" for kind in ("weight", "bias", LORA_B)),
    *_GATED,
)


_AUXILIARY = "auxiliary_heads."


def is_auxiliary(name: str) -> bool:
    """Return whether a parameter is of the auxiliary heads of a finetuning, which a model works without."""
    return name.startswith(_AUXILIARY)


def is_adapter(name: str) -> bool:
    """Return whether a parameter is of a LoRA adapter."""
    return name.endswith((f".{LORA_A}", f".{LORA_B}"))


def is_of_one_run(name: str) -> bool:
    """Return whether a run adds the parameter to its model, so that a run that starts from its weights has its own."""
    return is_auxiliary(name) or is_adapter(name)


@dataclass(frozen=True)
class RowSpan:
    """Merged rows `[start, start + count)`, which tensor-parallel rank `rank` holds from its row `local` on."""

    rank: int
    local: int
    start: int
    count: int


def partition_dim(name: str) -> Literal[0, 1] | None:
    """Return the dimension along which a parameter is sharded; None where every rank holds the whole."""
    if name.endswith(_BY_COLUMNS):
        return 1
    return 0 if name.endswith(_BY_ROWS) else None


def row_spans(name: str, rows: int, ranks: int) -> list[RowSpan]:
    """Return which rank holds which merged rows of a parameter, ascending by merged row, each row once.

    Args:
        name: Native parameter name.
        rows: Rows of the merged parameter: where it is sharded by rows, a multiple of `ranks` (of 2 x ranks for a
            gated layer).
        ranks: Tensor-parallel size.
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
    """Return the shape of one rank's shard of a parameter.

    Args:
        name: Native parameter name.
        merged: Shape of the merged parameter.
        ranks: Tensor-parallel size.
    """
    cut = partition_dim(name)
    return tuple(size // ranks if dimension == cut else size for dimension, size in enumerate(merged))
