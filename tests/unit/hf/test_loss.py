"""PauseLoss against transformers' own loss, and its sums over micro-batches."""

from __future__ import annotations

import pytest
import torch
from support.tiny_llama import llama

from pause_megatron.errors import ConfigError
from pause_megatron.hf.loss import PauseLoss

PAUSES = range(30, 32)


@pytest.fixture(scope="module")
def model():
    return llama(32, pauses=2)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """Three rows with different numbers of pauses, in runs and at the end."""
    ids = torch.randint(3, 30, (3, 20), generator=torch.Generator().manual_seed(0))
    ids[0, [4, 5, 9, 19]] = torch.tensor([30, 31, 30, 30])
    ids[1, 7] = 30
    return ids


def _labels(ids: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(ids >= PAUSES.start, -100)


def test_it_is_the_models_own_loss_and_input_ids_serve_as_labels(model, ids):
    logits = model(ids).logits
    own = model(ids, labels=_labels(ids)).loss
    for labels in (_labels(ids), ids):
        total, targets = PauseLoss(PAUSES).sum(logits, labels)
        assert targets == 3 * 19 - 5 == (_labels(ids)[:, 1:] != -100).sum()
        torch.testing.assert_close(total / targets, own)
    torch.testing.assert_close(PauseLoss(PAUSES)({"logits": logits}, ids), own)
    assert not torch.isclose(own, model(ids, labels=ids).loss)  # pauses are targets there


def test_no_pause_is_ever_a_target(model, ids):
    """The definition, token by token (Goyal et al., section 3.1)."""
    log_softmax = model(ids).logits.log_softmax(-1)
    terms = [
        -log_softmax[row, place, ids[row, place + 1]]
        for row in range(3)
        for place in range(19)
        if ids[row, place + 1] not in PAUSES
    ]
    total, targets = PauseLoss(PAUSES).sum(model(ids).logits, ids)
    assert targets == len(terms)
    torch.testing.assert_close(total, torch.stack(terms).sum())


def test_excluded_pauses_and_padding_rows_take_no_part(model, ids):
    logits = model(ids).logits
    padded = torch.cat([logits, torch.full((3, 20, 4), 50.0)], dim=-1)
    kept, excluded = PauseLoss(PAUSES, rows=32), PauseLoss(PAUSES, softmax="exclude", rows=32)
    torch.testing.assert_close(kept.sum(padded, ids), PauseLoss(PAUSES).sum(logits, ids))
    torch.testing.assert_close(excluded.sum(padded, ids)[0], PauseLoss(PAUSES).sum(logits[..., :30], ids)[0])
    assert excluded.sum(padded, ids)[0] < kept.sum(padded, ids)[0]


def test_micro_batches_add_up_to_the_batch_in_loss_and_gradient(model, ids):
    loss, gradients = PauseLoss(PAUSES), []
    whole = loss.sum(model(ids).logits, ids)
    for rows in (1, 3):
        model.zero_grad()
        parts = [loss({"logits": model(part).logits}, part, whole[1]) for part in ids.split(rows)]
        torch.testing.assert_close(sum(parts), whole[0] / whole[1])
        sum(parts).backward()
        gradients.append(model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_half_precision_logits_are_summed_in_fp32(model, ids):
    logits = model(ids).logits.bfloat16()
    total, _ = PauseLoss(PAUSES).sum(logits, ids)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, PauseLoss(PAUSES).sum(logits.float(), ids)[0])


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="softmax: expected 'keep' or 'exclude', got 'drop'"):
        PauseLoss(PAUSES, softmax="drop")
    with pytest.raises(ConfigError, match="rows: expected 32 or more, so that the pauses are among them, got 31"):
        PauseLoss(PAUSES, rows=31)
