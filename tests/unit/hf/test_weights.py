"""The table between the two worlds is complete, and cutting by tensor parallelism loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pause_megatron.checkpoint.layout import partition_dim, row_spans, shard_shape
from pause_megatron.config.families import FAMILIES
from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.config.presets import parameters
from pause_megatron.hf.weights import hf_tensors, native_rows, native_shapes

sections = st.builds(
    lambda layers, groups, queries, channels, ffn, tied, bias: ResolvedModel(
        preset=None,
        layers=layers,
        hidden=groups * queries * channels * 2,
        heads=groups * queries,
        kv_heads=groups,
        ffn=ffn,
        tied=tied,
        qkv_bias=bias,
    ),
    *(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(4, 8), st.integers(8, 20)),
    *(st.booleans(), st.booleans()),
)


@given(sections, st.integers(1, 50))
def test_every_native_row_is_in_exactly_one_tensor(model, rows):
    tensors = hf_tensors(model, rows, FAMILIES["qwen2"])
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    shapes = native_shapes(model, rows)
    for name, pieces in native_rows(tensors).items():
        end = 0
        for piece in pieces:
            assert piece.native == end
            end += piece.count
        assert end == shapes[name][0]
    for tensor in tensors:
        assert sum(piece.count for piece in tensor.rows) == tensor.shape[0]
        assert all(shapes[piece.name][1:] == tensor.shape[1:] for piece in tensor.rows)


@given(sections, st.integers(1, 50))
def test_parameters_are_counted_as_they_are(model, rows):
    size = sum(_numel(tensor.shape) for tensor in hf_tensors(model, rows, FAMILIES["qwen2"]))
    assert size == sum(map(_numel, native_shapes(model, rows).values()))
    assert size == parameters(model, rows)


@given(sections, st.integers(1, 50), st.integers(2, 4), st.data())
def test_a_looped_model_is_written_as_one_whose_layers_repeat(model, rows, loops, data):
    first = data.draw(st.integers(0, model.layers - 1))
    last = data.draw(st.integers(first, model.layers - 1))
    whole = data.draw(st.booleans())
    looped = model.model_copy(update={"loops": loops, "loop_layers": None if whole else f"{first}..{last}"})
    order = [*range(model.layers)] * loops
    if not whole:
        order = [*range(first), *([*range(first, last + 1)] * loops), *range(last + 1, model.layers)]
    deep = model.model_copy(update={"layers": len(order)})
    assert looped.depth == len(order) and tuple(looped.order) == tuple(order) and looped.unrolled() == deep
    assert native_shapes(looped, rows) == native_shapes(model, rows)
    written, plain = (hf_tensors(each, rows, FAMILIES["qwen2"]) for each in (looped, deep))
    assert [(t.name, t.shape) for t in written] == [(t.name, t.shape) for t in plain]
    for tensor, unrolled in zip(written, plain, strict=True):
        for rows_of, of_deep in zip(tensor.rows, unrolled.rows, strict=True):
            head, *layer = of_deep.name.split(".layers.")
            index, _, rest = "".join(layer).partition(".")
            expected = f"{head}.layers.{order[int(index)]}.{rest}" if layer else head
            assert (rows_of.name, rows_of.start, rows_of.count) == (expected, of_deep.start, of_deep.count)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 5))
def test_the_spans_of_a_parameter_tile_its_rows_and_its_shards(ranks, share):
    for name in ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "output_layer.weight", "norm.weight"):
        rows = 2 * ranks * share
        spans = row_spans(name, rows, ranks)
        assert [span.start for span in spans] == sorted(span.start for span in spans)
        assert sorted(row for span in spans for row in range(span.start, span.start + span.count)) == list(range(rows))
        for rank in {span.rank for span in spans}:
            local = [row for span in spans if span.rank == rank for row in range(span.local, span.local + span.count)]
            assert sorted(local) == list(
                range(shard_shape(name, (rows, 3), ranks)[0] if partition_dim(name) == 0 else rows)
            )


def test_a_gated_layer_is_cut_in_halves():
    """Two ranks, gate rows 0..3, up rows 4..7: each rank holds its part of the gate, then its part of the up matrix."""
    spans = row_spans("decoder.layers.0.mlp.linear_fc1.weight", 8, 2)
    assert [(s.rank, s.local, s.start, s.count) for s in spans] == [
        (0, 0, 0, 2),
        (1, 0, 2, 2),
        (0, 2, 4, 2),
        (1, 2, 6, 2),
    ]


@pytest.mark.parametrize("cls", ["Llama", "Qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_names_what_transformers_names(cls, tied):
    import transformers

    model = ResolvedModel(
        preset=None, layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, tied=tied, qkv_bias=cls == "Qwen2"
    )
    config = getattr(transformers, f"{cls}Config")(
        vocab_size=11,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    theirs = {name: tuple(p.shape) for name, p in getattr(transformers, f"{cls}ForCausalLM")(config).named_parameters()}
    assert {tensor.name: tensor.shape for tensor in hf_tensors(model, 11, FAMILIES[cls.lower()])} == theirs


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
