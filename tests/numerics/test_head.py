"""The pause-aware head against megatron-core's own path, and what must never change the loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.ranks import run_on_ranks
from support.tiny_model import SEQ, TEXT_SIZE, batch, distance, loss_of, section, take_gradients, tiny, whole
from torch import Tensor, nn

from pause_megatron.config.rules import check_shape
from pause_megatron.config.schema import ParallelSection

TOPOLOGIES = [(1, False), (2, False), (2, True)]


def plain_model_differences(tied: bool, precision: str) -> dict[str, bool]:
    """Token losses and gradients of PauseGPTModel and of a stock GPTModel with the same weights: bitwise equal?"""
    from megatron.core.models.gpt import GPTModel

    from pause_megatron.distributed import initialize
    from pause_megatron.model.build import transformer_config
    from pause_megatron.model.layers import block_spec

    parallel = ParallelSection()
    with initialize(parallel, device="cpu"):
        ours = tiny(parallel=parallel, pauses=0, tied=tied, vocab_multiple=1, head_chunk=4096, precision=precision)
        stock = GPTModel(
            transformer_config(check_shape(section(), parallel, SEQ), parallel, precision),
            block_spec(2),
            TEXT_SIZE,
            SEQ,
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
        )
        stock.load_state_dict(ours.state_dict())
        data = batch(1.0, pauses=0)
        scale = 0.37
        out = loss_of(ours, data, scale)
        out.loss.backward()
        losses = stock(data["tokens"], data["position_ids"], None, labels=data["labels"])
        rows = losses.t().reshape(-1)
        loss = scale * rows.sum()
        loss.backward()
        gradients = take_gradients(stock)
        same = {name: torch.equal(value, gradients[name]) for name, value in take_gradients(ours).items()}
        assert len(same) > 10
        return {
            **same,
            "token losses": torch.equal(out.token_losses, rows),
            "loss": torch.equal(out.loss, loss),
            "count": out.count == rows.numel(),
        }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_ignored_is_megatron_core_bit_for_bit(tied, precision):
    (same,) = run_on_ranks(1, plain_model_differences, tied, precision)
    assert all(same.values()), [name for name, equal in same.items() if not equal]


def token_losses_masked_afterwards(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """Losses [batch, seq] of all positions by megatron-core's output layer and cross-entropy, times the mask."""
    from pause_megatron.model.head import mask_columns

    hidden = model.hidden_states(data["tokens"], data["position_ids"])
    logits, _ = model.output_layer(hidden, runtime_gather_output=False)
    logits = mask_columns(logits, model.output_layer.masked)
    return model.compute_language_model_loss(data["labels"], logits) * data["mask"]


def masked_afterwards_differences(tensor: int, sequence: bool) -> dict[str, float]:
    """Largest relative difference of loss and gradients between the head and masking afterwards, per case."""
    from pause_megatron.distributed import initialize

    parallel = ParallelSection(tensor=tensor, sequence=sequence)
    found = {}
    with initialize(parallel, device="cpu"):
        for tied, kv_heads, (pauses, softmax), chunk in itertools.product(
            (True, False), (4, 2), ((1, "keep"), (1, "exclude"), (3, "exclude")), (1, 7, 4096)
        ):
            if kv_heads == 2 and chunk == 1:
                continue
            model = tiny(
                parallel=parallel, pauses=pauses, softmax=softmax, tied=tied, kv_heads=kv_heads, head_chunk=chunk
            )
            for kept in (0.9, 0.4, 0.0):
                data = batch(kept, pauses=pauses)
                out = loss_of(model, data, 0.01)
                out.loss.backward()
                ours = take_gradients(model)
                loss = 0.01 * token_losses_masked_afterwards(model, data).sum()
                loss.backward()
                case = f"tied={tied} kv={kv_heads} K={pauses} {softmax} chunk={chunk} kept={kept}"
                gap = abs(float(out.loss) - float(loss)) / max(abs(float(loss)), 1e-30)
                found[case] = max(gap, distance(ours, take_gradients(model)))
                assert out.count == int(data["mask"].sum())
    return found


@pytest.mark.parametrize(("tensor", "sequence"), TOPOLOGIES)
def test_head_equals_masking_afterwards(tensor, sequence):
    for found in run_on_ranks(tensor, masked_afterwards_differences, tensor, sequence):
        assert len(found) == 90
        worst = max(found, key=found.get)
        assert found[worst] <= 1e-6, f"{worst}: {found[worst]:.1e}"
        assert all(value == 0.0 for case, value in found.items() if case.endswith("kept=0.0"))


def gradients_at(tensor: int, sequence: bool, multiple: int, tied: bool) -> tuple:
    """Loss and whole gradients of one batch, the same for every topology and padding."""
    from pause_megatron.distributed import initialize

    parallel = ParallelSection(tensor=tensor, sequence=sequence)
    with initialize(parallel, device="cpu") as context:
        model = tiny(parallel=parallel, pauses=2, tied=tied, vocab_multiple=multiple)
        start = whole(model, {n: p.detach() for n, p in model.named_parameters()}, context.tp_group)
        out = loss_of(model, batch(0.8, pauses=2), 0.01)
        out.loss.backward()
        return float(out.loss), whole(model, take_gradients(model), context.tp_group), start


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_and_padding_never_matter(tied):
    """Method, invariant 7: TP 1, 2, 4, SP or not, padded by 1 or by 128: one start, one loss, one gradient."""
    loss, gradients, start = run_on_ranks(1, gradients_at, 1, False, 1, tied)[0]
    for tensor, sequence, multiple in [(1, False, 128), (2, False, 1), (2, True, 128), (4, False, 1), (4, True, 128)]:
        for got_loss, got, got_start in run_on_ranks(tensor, gradients_at, tensor, sequence, multiple, tied):
            assert all(torch.equal(got_start[name], start[name]) for name in start)
            assert got_loss == pytest.approx(loss, rel=1e-6)
            assert distance(got, gradients) <= 2e-6, (tensor, sequence, multiple)


def label_of_a_pause_target(softmax: str) -> list[bool]:
    """Through the labels path: does another label at a masked position change anything?"""
    from pause_megatron.distributed import initialize

    parallel = ParallelSection()
    with initialize(parallel, device="cpu"):
        model = tiny(parallel=parallel, softmax=softmax)
        data = batch(0.7)
        results = []
        for filler in (0, 17, TEXT_SIZE):
            labels = torch.where(data["mask"], data["labels"], filler)
            losses = model(data["tokens"], data["position_ids"], None, labels=labels, loss_mask=data["mask"])
            losses.sum().backward()
            results.append((losses.detach(), take_gradients(model)))
        out = loss_of(model, data)
        out.loss.backward()
        ours = take_gradients(model)
    losses, gradients = results[0]
    kept = losses.t().reshape(-1)[data["rows"]]
    return [
        *(
            torch.equal(losses, other) and distance(other_gradients, gradients) == 0
            for other, other_gradients in results
        ),
        torch.allclose(kept, out.token_losses, rtol=1e-6, atol=0),
        distance(ours, gradients) <= 1e-6,
        not losses[~data["mask"]].any(),
    ]


@pytest.mark.parametrize("softmax", ["keep", "exclude"])
def test_label_of_a_pause_target_never_matters(softmax):
    """Method, invariant 3; and a Megatron-LM script's `labels=` gives what `targets=` gives."""
    assert all(run_on_ranks(1, label_of_a_pause_target, softmax)[0])


def refusals() -> list[str]:
    from pause_megatron.distributed import initialize

    parallel = ParallelSection()
    messages = []
    with initialize(parallel, device="cpu"):
        model = tiny(parallel=parallel)
        out = loss_of(model, batch(0.5))
        out.loss.backward(retain_graph=True)
        try:
            out.loss.backward()
        except RuntimeError as error:
            messages.append(str(error))
        with torch.no_grad():
            quiet = loss_of(model, batch(0.5))
        assert not quiet.loss.requires_grad
        assert torch.equal(quiet.token_losses, out.token_losses)
    return messages


def test_second_backward_is_refused_and_no_grad_gives_the_same_losses():
    (messages,) = run_on_ranks(1, refusals)
    assert "expected one backward pass, got a second" in messages[0]
