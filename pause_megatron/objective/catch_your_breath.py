"""Catch Your Breath (arXiv:2510.13879): the model asks for further steps, in three forms of the loss.

The formulas follow the definitions in the paper's abstract; its body was not consulted. At step s of a run of S pauses,
d_s is the probability of the request, which is the first pause as an output, and p_s(y) that of the target; both are
parts of one softmax over text and request. At the last step no request is possible, so d_S = 0 and p_S is the softmax
over text. A run of no pauses is plain cross-entropy over text. Further pause ids (`pause.embeddings`) are in
no softmax.

    stay(s) = d_0 x ... x d_(s-1)                the request was made at all steps before s
    q(s)    = (1 - d_s) x stay(s)                the answer is given at step s
    CE_s    = -log p_s(y) among text             = -log p_s(y) / (1 - d_s)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pause_megatron.config.schema import ObjectiveSection
from pause_megatron.objective.chunk import Chunk
from pause_megatron.objective.protocol import Terms
from pause_megatron.objective.shipped import STEP_NAMES, at_last, loss_by_step


class Decisions(NamedTuple):
    """A chunk's runs, each [targets, longest run].

    Attributes:
        losses: CE_s; 0 after the end of a run.
        log_answer: log q(s); -inf after the end of a run.
        steps: s, fp32 [longest run].
        is_step: Whether the run has this step.
        is_last: Whether it is its last.
    """

    losses: Tensor
    log_answer: Tensor
    steps: Tensor
    is_step: Tensor
    is_last: Tensor


class CatchYourBreath:
    """What the three forms share. A subclass returns the loss of each target.

    Args:
        section: Section `objective`.
    """

    runs, names = True, (*STEP_NAMES, "requested_steps", "request_probability")

    def __init__(self, section: ObjectiveSection) -> None:
        self.section = section

    def weights(self, index: Tensor, length: Tensor, weight: Tensor) -> Tensor:
        """Return the weight of the target at the last step, 0 at the others."""
        return at_last(index, length, weight)

    def losses(self, runs: Decisions) -> Tensor:
        """Return the loss of each target, [targets].

        Args:
            runs: The decisions of the targets' runs.
        """
        raise NotImplementedError

    def terms(self, chunk: Chunk) -> Terms:
        """Return weight x loss of each target, and the means of requests over targets that have pauses before them."""
        text = chunk.log_normalizer(pauses=False)
        losses = text - chunk.logit(chunk.targets)
        # log d = log sigmoid(request - text), log (1 - d) = log sigmoid(text - request): finite for all finite logits.
        margin = chunk.logit(chunk.request_id) - text
        log_request = torch.where(chunk.is_last, 0.0, F.logsigmoid(margin))
        log_stop = torch.where(chunk.is_last, 0.0, F.logsigmoid(-margin))
        requested = chunk.by_target(log_request)
        is_step = chunk.by_target(torch.ones_like(chunk.is_last), fill=False)
        log_stay = F.pad(requested.cumsum(dim=1), (1, -1))  # of the steps before; a difference would lose digits
        runs = Decisions(
            chunk.by_target(losses),
            torch.where(is_step, chunk.by_target(log_stop) + log_stay, -math.inf),
            torch.arange(chunk.longest, device=text.device, dtype=text.dtype),
            is_step,
            chunk.by_target(chunk.is_last, fill=False),
        )
        with_pauses = chunk.last(chunk.length) > 1
        means = {
            **loss_by_step(chunk, losses),
            "requested_steps": ((runs.log_answer.exp() * runs.steps).sum(dim=1), with_pauses),
            "request_probability": (torch.sigmoid(margin), ~chunk.is_last),
        }
        return Terms(chunk.last(chunk.weights) * self.losses(runs), chunk.last(losses), means)


class CybAnytime(CatchYourBreath):
    """Likelihood of the target at whichever step it is answered, discounted: -log sum_s discount^s p_s(y) stay(s)."""

    def losses(self, runs: Decisions) -> Tensor:
        """Return the loss of each target, [targets]."""
        return -torch.logsumexp(runs.log_answer - runs.losses + runs.steps * math.log(self.section.discount), dim=1)


class CybVariational(CatchYourBreath):
    """Expected cross-entropy and KL to a prior over stopping: sum_s q(s) CE_s + KL(q || g).

    g is geometric with `stop_rate` r, and its last step has the rest: g(s) = r (1 - r)^s before it, g(S) = (1 - r)^S.
    """

    def losses(self, runs: Decisions) -> Tensor:
        """Return the loss of each target, [targets]."""
        rate = self.section.stop_rate
        log_prior = runs.steps * math.log1p(-rate) + torch.where(runs.is_last, 0.0, math.log(rate))
        log_answer = torch.where(runs.is_step, runs.log_answer, 0.0)
        terms = log_answer.exp() * (runs.losses + log_answer - log_prior)
        return torch.where(runs.is_step, terms, 0.0).sum(dim=1)


class CybBudget(CatchYourBreath):
    """Expected cross-entropy and a cost for each requested step: sum_s q(s) (CE_s + step_cost s)."""

    def losses(self, runs: Decisions) -> Tensor:
        """Return the loss of each target, [targets]."""
        return (runs.log_answer.exp() * (runs.losses + self.section.step_cost * runs.steps)).sum(dim=1)
