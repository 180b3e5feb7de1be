"""Catch Your Breath where requests are all but certain or impossible: value and gradient against fp64."""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pause_megatron.config.schema import ObjectiveSection
from pause_megatron.objective import Chunk, loss_plan
from pause_megatron.objective.chunk import Columns

TEXT, MARGINS = 7, (-300.0, -40.0, -1e-3, 2.0, 40.0, 300.0)
PAUSES = (TEXT, TEXT + 1)
SIZES = [1, 2, 3, 51]


def logits_of_runs() -> Tensor:
    """Rows of runs whose requests have these margins over the text, in any order."""
    draw = torch.Generator().manual_seed(0)
    orders = itertools.cycle(itertools.chain(*itertools.product(MARGINS, repeat=3)))
    margins = list(itertools.islice(orders, sum(SIZES)))
    logits = 4 * torch.randn(sum(SIZES), TEXT + 2, generator=draw, dtype=torch.float64)
    logits[:, TEXT] = logits[:, :TEXT].logsumexp(1) + torch.tensor(margins[::-1], dtype=torch.float64)
    return logits.float()


def by_hand(section: ObjectiveSection, logits: Tensor, target: int) -> Tensor:
    """The loss of one target in fp64, step by step."""
    text, last = logits[:, :TEXT].logsumexp(1), len(logits) - 1
    stay, terms = logits.new_zeros(()), []
    for s, row in enumerate(logits):
        both = torch.logaddexp(text[s], row[TEXT])
        answer = stay + (text[s] - both if s < last else 0.0)
        loss = text[s] - row[target]
        if section.name == "cyb_anytime":
            terms.append(answer - loss + s * torch.tensor(section.discount).double().log())
        elif section.name == "cyb_budget":
            terms.append(answer.exp() * (loss + section.step_cost * s))
        else:
            rate = torch.tensor(section.stop_rate, dtype=torch.float64)
            prior = s * torch.log1p(-rate) + (rate.log() if s < last else 0.0)
            terms.append(answer.exp() * (loss + answer - prior))
        stay = stay + row[TEXT] - both
    together = torch.stack(terms)
    return -together.logsumexp(0) if section.name == "cyb_anytime" else together.sum()


def assert_means_are_those_of_fp64(means: dict[str, tuple[Tensor, Tensor]], runs: Sequence[Tensor]) -> None:
    """Requests, and losses by step, are those of runs with pauses, found step by step."""
    requests, expected, losses = [], [], [[] for _ in range(4)]
    for target, rows in enumerate(runs):
        if len(rows) == 1:
            continue
        text = rows[:, :TEXT].logsumexp(1)
        request = torch.sigmoid(rows[:-1, TEXT] - text[:-1]).tolist()
        requests += request
        # The expected number of requests is the sum of the probabilities of at least 1, 2, ... of them.
        expected.append(sum(math.prod(request[:steps]) for steps in range(1, len(rows))))
        for step in range(min(4, len(rows))):
            losses[step].append(float(text[step] - rows[step, target]))
    wanted = {"request_probability": requests, "requested_steps": expected}
    wanted |= {f"loss_step_{step}": values for step, values in enumerate(losses)}
    assert means.keys() == wanted.keys()
    for name, values in wanted.items():
        found, weights = (each.detach().double() for each in means[name])
        assert weights.sum() == len(values), name
        assert float((found * weights).sum()) == pytest.approx(sum(values), rel=2e-6), name


@pytest.mark.parametrize("name", ["cyb_anytime", "cyb_variational", "cyb_budget"])
def test_value_and_gradient_are_those_of_fp64(name):
    section = ObjectiveSection(name=name, **({"discount": 0.9} if name == "cyb_anytime" else {}))
    sizes, targets = torch.tensor(SIZES), torch.arange(len(SIZES))
    objective, logits = loss_plan(section).objective, logits_of_runs()
    index = torch.cat([torch.arange(size) for size in SIZES])
    length = sizes.repeat_interleave(sizes)
    chunk = Chunk(
        logits,
        torch.zeros(len(logits), 4),
        targets=targets,
        sizes=sizes,
        is_pause=index > 0,
        weights=objective.weights(index, length, torch.ones(len(logits))),
        longest=max(SIZES),
        columns=Columns(0, PAUSES, PAUSES, types.SimpleNamespace(size=lambda: 1)),
        differentiable=True,
    )
    values, _, means = objective.terms(chunk)
    assert_means_are_those_of_fp64(means, logits.double().split(SIZES))
    gradient, _ = chunk.gradient(values.sum())
    exact = logits.double().requires_grad_()
    expected = [by_hand(section, part, i) for i, part in enumerate(exact.split(SIZES))]
    for found, wanted in zip(values.tolist(), expected, strict=True):
        assert found == pytest.approx(wanted.item(), rel=2e-6, abs=2e-6)
    (wanted,) = torch.autograd.grad(sum(expected), exact)
    assert gradient.isfinite().all()
    assert (gradient.double() - wanted).norm() < 3e-6 * wanted.norm()
