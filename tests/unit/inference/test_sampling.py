"""Draws come from the distribution, depend only on their key, and stay inside top-k and top-p."""

from __future__ import annotations

from dataclasses import replace

import torch

from pause_megatron.inference.sampling import Sampling

LOGITS = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04, 0.0]))


def draws(sampling, count=4000):
    rows = LOGITS.expand(count, -1)
    return torch.bincount(torch.tensor(sampling.select(rows, 0)), minlength=6) / count


def test_draws_follow_the_distribution():
    assert (draws(Sampling(temperature=1.0)) - LOGITS.exp()).abs().max() < 0.025
    expected = (LOGITS / 0.5).softmax(-1)
    assert (draws(Sampling(temperature=0.5)) - expected).abs().max() < 0.025


def test_top_k_and_top_p():
    assert draws(Sampling(temperature=1.0, top_k=2), 300).nonzero().flatten().tolist() == [0, 1]
    assert draws(Sampling(temperature=1.0, top_p=0.7), 300).nonzero().flatten().tolist() == [0, 1]
    assert draws(Sampling(temperature=1.0, top_p=0.71), 300).nonzero().flatten().tolist() == [0, 1, 2]
    assert draws(Sampling(temperature=1.0, top_p=1e-9), 300).nonzero().flatten().tolist() == [0]
    assert draws(Sampling(temperature=1.0, top_k=100), 300).count_nonzero() >= 4


def test_a_draw_depends_only_on_seed_row_and_position():
    sampling = Sampling(temperature=1.0, seed=3, rows=range(50))
    rows = LOGITS.expand(50, -1)
    together = sampling.select(rows, 4)
    assert together == [replace(sampling, rows=[row]).select(LOGITS[None], 4)[0] for row in range(50)]
    assert together != sampling.select(rows, 5)
    assert together != replace(sampling, seed=4).select(rows, 4)
    assert together != replace(sampling, rows=range(50, 100)).select(rows, 4)


def test_greedy_takes_the_most_likely_token_for_every_seed():
    assert Sampling(seed=9).select(LOGITS.expand(3, -1), 0) == [0, 0, 0]
