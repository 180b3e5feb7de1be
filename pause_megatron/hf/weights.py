"""Weight mapping: the native rows that make up each Hugging Face tensor, read in both directions.

Rows are those of merged parameters (`checkpoint.layout`); `config.families` has the tensors of a layer. Vocabulary
padding is dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from pause_megatron.config.families import Family, LayerTensor, layer_tensors
from pause_megatron.config.model_schema import ResolvedModel

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


@dataclass(frozen=True)
class Rows:
    """Rows `[start, start + count)` of a merged native parameter."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a Hugging Face model.

    Attributes:
        name: Name of the tensor.
        shape: Shape of the tensor.
        rows: Native rows that it consists of, in order; empty for a tensor of zeros.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class HFRows:
    """Rows `[start, start + count)` of a Hugging Face tensor, which begin at row `native` of a native parameter."""

    name: str
    start: int
    count: int
    native: int


def hf_tensors(model: ResolvedModel, live_rows: int, family: Family | None = None) -> list[HFTensor]:
    """Return every tensor of the Hugging Face model, in the order of its layers; those of a looped model are repeated.

    Args:
        model: Sizes of the model.
        live_rows: Vocabulary rows that are text or pauses.
        family: Family of the model; None for the tensors that the native model has.
    """
    tensors = [_whole("model.embed_tokens.weight", EMBEDDING, (live_rows, model.hidden))]
    table = layer_tensors(model)
    zeros = family.zero_biases(model) if family is not None else ()
    for layer, number in enumerate(model.order):
        hf, native = f"model.layers.{layer}.", f"decoder.layers.{number}."
        tensors += layer_rows(table, hf, native)
        tensors += [HFTensor(f"{hf}{name}", (model.hidden,), ()) for name in zeros]
    tensors.append(_whole("model.norm.weight", "decoder.final_layernorm.weight", (model.hidden,)))
    if not model.tied:
        tensors.append(_whole("lm_head.weight", HEAD, (live_rows, model.hidden)))
    return tensors


def native_rows(tensors: list[HFTensor]) -> dict[str, list[HFRows]]:
    """Invert the table: return, for each native parameter, the Hugging Face rows that fill it, ascending.

    Args:
        tensors: The table, as from `hf_tensors`.
    """
    pieces_of: dict[str, list[HFRows]] = defaultdict(list)
    for tensor in tensors:
        offset = 0
        for rows in tensor.rows:
            pieces_of[rows.name].append(HFRows(tensor.name, offset, rows.count, rows.start))
            offset += rows.count
    return {name: sorted(pieces, key=lambda piece: piece.native) for name, pieces in pieces_of.items()}


def native_shapes(model: ResolvedModel, padded_rows: int) -> dict[str, tuple[int, ...]]:
    """Return the merged shape of every native parameter, by name.

    Args:
        model: Sizes of the model.
        padded_rows: Vocabulary rows, padding included.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in hf_tensors(model.model_copy(update={"loops": 1, "loop_layers": None}), padded_rows):
        for rows in tensor.rows:
            length = max(shapes.get(rows.name, (0,))[0], rows.start + rows.count)
            shapes[rows.name] = (length, *tensor.shape[1:])
    return shapes


def config_keys_of(name: str) -> str:
    """Return the keys of config.json that a Hugging Face tensor's existence and shape follow from, for messages.

    Args:
        name: Name of the tensor.
    """
    found = next((keys for part, keys in _KEYS.items() if part in name), "model_type")
    return f"num_hidden_layers, {found}" if ".layers." in name else found


_KEYS = {
    "embed_tokens": "vocab_size, hidden_size",
    "lm_head": "tie_word_embeddings, vocab_size, hidden_size",
    "q_norm": "model_type, num_attention_heads, head_dim",
    "k_norm": "model_type, num_key_value_heads, head_dim",
    "norm": "model_type, hidden_size",
    "_proj.bias": "attention_bias, mlp_bias, model_type",
    "q_proj": "num_attention_heads, head_dim, hidden_size",
    "o_proj": "num_attention_heads, head_dim, hidden_size",
    "k_proj": "num_key_value_heads, head_dim, hidden_size",
    "v_proj": "num_key_value_heads, head_dim, hidden_size",
    "mlp.": "intermediate_size, hidden_size",
}
"""Keys of config.json by a part of the names of tensors; the first part found counts."""


def _whole(name: str, native: str, shape: tuple[int, ...]) -> HFTensor:
    return HFTensor(name, shape, (Rows(native, 0, shape[0]),))


def layer_rows(table: Iterable[LayerTensor], hf: str, native: str) -> list[HFTensor]:
    """Return the Hugging Face tensors of a layer, with the native rows that they consist of.

    Args:
        table: Parameters of the layer.
        hf: Prefix of the Hugging Face names.
        native: Prefix of the native names.
    """
    rows_of: dict[str, list[Rows]] = defaultdict(list)
    width_of: dict[str, tuple[int, ...]] = {}
    for tensor in table:
        for piece in tensor.pieces:
            rows_of[piece.name].append(Rows(f"{native}{tensor.name}", piece.start, piece.count))
            width_of[piece.name] = tensor.shape[1:]
    return [
        HFTensor(f"{hf}{name}", (sum(one.count for one in rows), *width_of[name]), tuple(rows))
        for name, rows in rows_of.items()
    ]
