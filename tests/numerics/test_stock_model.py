"""PauseGPTModel beside megatron-core's own GPTModel: the same parameters, names, checkpoints, logits and losses."""

from __future__ import annotations

import itertools
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny_model import SEQ, TEXT_SIZE, batch, section, tiny

from pause_megatron.config.rules import check_shape
from pause_megatron.config.schema import ParallelSection
from pause_megatron.errors import ConfigError


def both(
    parallel: ParallelSection, *, tied: bool, positions: str = "rope", pre: bool = True, post: bool = True
) -> tuple:
    """Our model and the stock one, with the same weights and no padding rows."""
    from megatron.core.models.gpt import GPTModel

    from pause_megatron.model import PauseGPTModel, Vocabulary
    from pause_megatron.model.build import transformer_config
    from pause_megatron.model.layers import block_spec

    torch.manual_seed(3)
    arguments = dict(
        config=transformer_config(check_shape(section(), parallel, SEQ), parallel, "fp32"),
        transformer_layer_spec=block_spec(2),
        vocab_size=TEXT_SIZE + 2,
        max_sequence_length=SEQ,
        pre_process=pre,
        post_process=post,
        share_embeddings_and_output_weights=tied,
        position_embedding_type=positions,
    )
    ours = PauseGPTModel(**arguments, vocabulary=Vocabulary(TEXT_SIZE, (TEXT_SIZE, TEXT_SIZE + 1)))
    stock = GPTModel(**arguments)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def differences(tensor: int, sequence: bool) -> dict[str, bool]:
    """Names, logits, token losses and gradients: equal?"""
    from pause_megatron.distributed import initialize

    found = {}
    parallel = ParallelSection(tensor=tensor, sequence=sequence)
    with initialize(parallel, device="cpu"):
        for tied, positions in itertools.product((True, False), ("rope", "learned_absolute", "none")):
            ours, stock = both(parallel, tied=tied, positions=positions)
            data = batch(1.0, pauses=0)
            inputs = data["tokens"], data["position_ids"], None
            losses, expected = (model(*inputs, labels=data["labels"]) for model in (ours, stock))
            losses.sum().backward()
            expected.sum().backward()
            gradients = {name: parameter.grad for name, parameter in stock.named_parameters()}
            extra = [key for key in stock.state_dict() if key.endswith("_extra_state")]
            found[f"{tied} {positions}"] = (
                [name for name, _ in ours.named_parameters()] == list(gradients)
                and list(ours.state_dict()) == [key for key in stock.state_dict() if key not in extra]
                and torch.equal(ours(*inputs), stock(*inputs))
                and torch.equal(losses, expected)
                and all(_equal(p.grad, gradients[name], tensor) for name, p in ours.named_parameters())
            )
    return found


def _equal(got: torch.Tensor, expected: torch.Tensor, tensor: int) -> bool:
    # Tensor-parallel ranks gather rows for our head before its product, and GPTModel within it: another order of sums.
    return torch.equal(got, expected) if tensor == 1 else torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_it_is_the_stock_model_where_nothing_is_left_out(tensor: int, sequence: bool) -> None:
    for found in run_on_ranks(tensor, differences, tensor, sequence):
        assert len(found) == 6 and all(found.values()), found


def sharded_states(tensor: int) -> list[bool]:
    """Megatron-LM's own checkpoints: the same keys, shapes and places of each shard."""
    from pause_megatron.distributed import initialize

    parallel = ParallelSection(tensor=tensor)
    same = []
    with initialize(parallel, device="cpu"):
        for tied in (True, False):
            ours, stock = (model.sharded_state_dict() for model in both(parallel, tied=tied))
            places = [
                {
                    name: (shard.key, shard.global_shape, shard.global_offset)
                    for name, shard in state.items()
                    if hasattr(shard, "global_offset")
                }
                for state in (ours, stock)
            ]
            same.append(len(places[0]) > 10 and places[0] == places[1] and ours.keys() == stock.keys())
    return same


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_megatron_checkpoint_has_the_same_shards(tensor: int) -> None:
    assert all(all(same) for same in run_on_ranks(tensor, sharded_states, tensor))


def stages() -> dict[str, bool]:
    """A stage without the head, and one without the embedding, fed as a pipeline schedule does."""
    from pause_megatron.distributed import initialize

    parallel = ParallelSection()
    with initialize(parallel, device="cpu"):
        data = batch(1.0, pauses=0)
        first, stock_first = both(parallel, tied=False, post=False)
        last, stock_last = both(parallel, tied=False, pre=False)
        hidden = [model(data["tokens"], data["position_ids"], None) for model in (first, stock_first)]
        for model, state in ((last, hidden[0]), (stock_last, hidden[1])):
            model.set_input_tensor([state])
        losses = [model(None, data["position_ids"], None, labels=data["labels"]) for model in (last, stock_last)]
        return {
            "hidden": torch.equal(*hidden),
            "losses": torch.equal(*losses),
            "names": not any(name.startswith("output_layer") for name, _ in first.named_parameters())
            and not any(name.startswith("embedding") for name, _ in last.named_parameters()),
        }


def test_stages_of_a_pipeline() -> None:
    (found,) = run_on_ranks(1, stages)
    assert all(found.values()), found


def said_when_built() -> list[str]:
    from pause_megatron.distributed import initialize

    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        with initialize(ParallelSection(), device="cpu"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = tiny(parallel=ParallelSection())
            data = batch(0.5)
            model(data["tokens"], data["position_ids"], target_rows=data["rows"], targets=data["targets"])
    finally:
        logging.getLogger().removeHandler(handler)
    return records + [str(warning.message) for warning in caught]


def test_nothing_that_it_is_made_of_is_deprecated() -> None:
    (said,) = run_on_ranks(1, said_when_built)
    # megatron-core says this of a default of its own TransformerConfig.
    said = [line for line in said if not line.startswith("full scope is deprecated")]
    assert [line for line in said if "deprecat" in line.lower()] == []


def refusals() -> list[str]:
    from pause_megatron.distributed import initialize
    from pause_megatron.model import PauseGPTModel, Vocabulary

    messages = []
    with initialize(ParallelSection(), device="cpu"):
        config = tiny(parallel=ParallelSection()).config
        for change, options in [
            ({}, {"position_embedding_type": "yarn"}),
            ({}, {"fp16_lm_cross_entropy": True}),
            ({}, {"mtp_block_spec": object()}),
            ({"multi_latent_attention": True}, {}),
            ({"mtp_num_layers": 1}, {}),
            ({"use_mup": True}, {}),
        ]:
            changed = SimpleNamespace(**{**vars(config), **change})
            try:
                PauseGPTModel(changed, None, 52, SEQ, vocabulary=Vocabulary(50, (50,)), **options)
            except ConfigError as error:
                messages.append(str(error))
        model, data = tiny(parallel=ParallelSection()), batch(0.5)
        for options in ({"inference_context": object()}, {"output_processor": print}):
            try:
                model(data["tokens"], data["position_ids"], **options)
            except TypeError as error:
                messages.append(str(error))
        model(data["tokens"], data["position_ids"], inference_context=None, padding_mask=None)
    return messages


def test_what_it_does_not_have_is_refused_by_name() -> None:
    (messages,) = run_on_ranks(1, refusals)
    names = [
        *("position_embedding_type", "fp16_lm_cross_entropy", "mtp_block_spec", "multi_latent_attention"),
        *("mtp_num_layers", "use_mup", "'inference_context'", "'output_processor'"),
    ]
    assert len(messages) == len(names)
    for name, message in zip(names, messages, strict=True):
        assert name in message and "expected" in message and "got" in message, message
