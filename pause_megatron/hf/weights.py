"""Weight mapping: the native rows that make up each Hugging Face tensor, in one table that is read in both directions.

Rows are those of merged parameters (`checkpoint.layout`). Differences between the two formats:

- megatron-core keeps queries, keys and values in one matrix, grouped by query group: the queries of group 0, its key,
  its value, the queries of group 1, ... Hugging Face keeps three matrices, each by head.
- megatron-core keeps SwiGLU's gate and up projection in one matrix, the gate first.
- Rotary channels are halves of a head in both (not interleaved pairs), so rows within a head stay in their order.
- Vocabulary padding is dropped.
- Biases on queries, keys and values are Qwen2's. LlamaForCausalLM has them only together with a bias on the attention's
  output, which is zero here.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from pause_megatron.config.schema import ResolvedModel

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


def hf_tensors(model: ResolvedModel, live_rows: int, family: str = "llama") -> list[HFTensor]:
    """Return every tensor of the Hugging Face model, in the order of its layers; those of a looped model are repeated.

    Args:
        model: Sizes of the model.
        live_rows: Vocabulary rows that are text or pauses.
        family: "llama", "mistral" or "qwen2".
    """
    tensors = [_whole("model.embed_tokens.weight", EMBEDDING, (live_rows, model.hidden))]
    for layer in range(model.depth):
        hf, native = f"model.layers.{layer}.", f"decoder.layers.{layer % model.layers}."
        tensors += _layer(model, hf, native)
        if model.qkv_bias and family == "llama":
            tensors.append(HFTensor(f"{hf}self_attn.o_proj.bias", (model.hidden,), ()))
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
    for tensor in hf_tensors(model.model_copy(update={"loops": 1}), padded_rows):
        for rows in tensor.rows:
            length = max(shapes.get(rows.name, (0,))[0], rows.start + rows.count)
            shapes[rows.name] = (length, *tensor.shape[1:])
    return shapes


def _whole(name: str, native: str, shape: tuple[int, ...]) -> HFTensor:
    return HFTensor(name, shape, (Rows(native, 0, shape[0]),))


def _layer(model: ResolvedModel, hf: str, native: str) -> list[HFTensor]:
    hidden, ffn = model.hidden, model.ffn
    fc1 = f"{native}mlp.linear_fc1.weight"
    tensors = [_whole(f"{hf}input_layernorm.weight", f"{native}input_layernorm.weight", (hidden,))]
    for part in "qkv":
        rows = _attention_rows(model, part)
        for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
            parameter = f"{native}self_attention.linear_qkv.{kind}"
            shape = (sum(count for _, count in rows), *((hidden,) if kind == "weight" else ()))
            pieces = tuple(Rows(parameter, start, count) for start, count in rows)
            tensors.append(HFTensor(f"{hf}self_attn.{part}_proj.{kind}", shape, pieces))
    return [
        *tensors,
        _whole(f"{hf}self_attn.o_proj.weight", f"{native}self_attention.linear_proj.weight", (hidden, hidden)),
        _whole(f"{hf}post_attention_layernorm.weight", f"{native}pre_mlp_layernorm.weight", (hidden,)),
        HFTensor(f"{hf}mlp.gate_proj.weight", (ffn, hidden), (Rows(fc1, 0, ffn),)),
        HFTensor(f"{hf}mlp.up_proj.weight", (ffn, hidden), (Rows(fc1, ffn, ffn),)),
        _whole(f"{hf}mlp.down_proj.weight", f"{native}mlp.linear_fc2.weight", (hidden, ffn)),
    ]


def _attention_rows(model: ResolvedModel, part: str) -> list[tuple[int, int]]:
    """(first row, rows) of the queries, keys or values of each query group in linear_qkv."""
    channels = model.hidden // model.heads
    queries = model.heads // model.kv_heads * channels
    offset, count = {"q": (0, queries), "k": (queries, channels), "v": (queries + channels, channels)}[part]
    return [(group * (queries + 2 * channels) + offset, count) for group in range(model.kv_heads)]
