"""Each objective against its formula in plain torch on the whole model's logits: value and gradient, on any ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.ranks import run_on_ranks
from support.tiny_model import TEXT_SIZE, distance, section, take_gradients, whole
from torch import Tensor

from pause_megatron.config.schema import ObjectiveSection, ParallelSection
from pause_megatron.data.batches.batch import MicroBatch, collate
from pause_megatron.objective import Chunk, LossPlan, Terms, loss_plan

PAUSES = range(TEXT_SIZE, TEXT_SIZE + 2)
LENGTH = 24
SECTIONS = {
    "weights": ObjectiveSection(token_weights=f"{__name__}:odd_ids_weigh_more"),
    "z_loss": ObjectiveSection(z_loss=0.3, token_weights="side"),
    "anytime": ObjectiveSection(name="anytime", discount=0.7, token_weights="side"),
    "cyb_anytime": ObjectiveSection(name="cyb_anytime", discount=0.8, z_loss=0.1),
    "cyb_variational": ObjectiveSection(name="cyb_variational", stop_rate=0.3, token_weights="side"),
    "cyb_budget": ObjectiveSection(name="cyb_budget", step_cost=0.2),
    "own": ObjectiveSection(name=f"{__name__}:Sharp"),
}


def odd_ids_weigh_more(ids: np.ndarray) -> np.ndarray:
    return np.where(ids % 2, 1.5, 0.25)


class Sharp:
    """Entropy at the last step of each run, from this rank's logits, and the norm of the hidden states."""

    runs, names = True, ("entropy",)

    def __init__(self, section: ObjectiveSection) -> None: ...

    def weights(self, index: Tensor, length: Tensor, weight: Tensor) -> Tensor:
        return weight * (index == length - 1)

    def terms(self, chunk: Chunk) -> Terms:
        normalizer = chunk.for_columns(chunk.log_normalizer())
        log_p = chunk.shard - normalizer.unsqueeze(1)
        live = chunk.shard > -math.inf
        entropy = -chunk.all_sum(torch.where(live, log_p.exp() * torch.where(live, log_p, 0.0), 0.0).sum(dim=1))
        losses = -chunk.log_probability(chunk.targets)
        values = chunk.weights * (losses + 0.2 * entropy + 0.1 * chunk.hidden.float().square().mean(dim=1))
        return Terms(values, chunk.last(losses), {"entropy": (entropy, chunk.weights)})


def plan_of(name: str) -> LossPlan:
    """The plan of a section; the functions of this file are not importable by its name in every process."""
    section = SECTIONS[name]
    if name == "own":
        return LossPlan(Sharp(section))
    if name == "weights":
        return LossPlan(loss_plan(ObjectiveSection(z_loss=1.0)).objective._objective, odd_ids_weigh_more, "odd")
    return loss_plan(section)


# Tokens of windows: t is text, p a pause, | begins a segment. Runs touch segments' beginnings, the window's, its end.
LAYOUTS = [
    "ttpptpt|tpppt|pptttpttpp",
    "tpttt|tttttttttttttttttt",
    "ttttttttttttttttttpppppp",
    "pppppppttttptptpptpppttt",
]


def sample_of(layout: str, seed: int) -> dict[str, Tensor]:
    """A window of a layout with random text; the target is the next token where that is text, also of a new segment."""
    draw = np.random.default_rng(seed)
    segments, kinds = [], []
    for number, part in enumerate(layout.split("|")):
        kinds += list(part)
        segments += [number] * len(part)
    kinds, segments = kinds[:LENGTH] + ["t"] * (LENGTH - len(kinds)), segments + [segments[-1]] * LENGTH
    pause, text = np.array([kind == "p" for kind in kinds]), draw.integers(0, TEXT_SIZE, LENGTH + 1)
    tokens = np.where(pause, draw.integers(PAUSES.start, PAUSES.stop, LENGTH), text[:LENGTH])
    mask = ~np.append(pause[1:], False)
    positions = np.array([index - segments.index(segments[index]) for index in range(LENGTH)])
    values = {
        "tokens": tokens,
        "labels": np.where(mask, text[1:], 0),
        "position_ids": positions,
        "loss_mask": mask.astype(np.float32),
        "segments": np.array(segments[:LENGTH], dtype=np.int32),
        "weights": draw.random(LENGTH).astype(np.float32),
    }
    return {name: torch.from_numpy(value) for name, value in values.items()}


def micro_batch(numbers: list[int], plan: LossPlan) -> MicroBatch:
    samples = [sample_of(LAYOUTS[number % 4], number) for number in numbers]
    return collate(samples, sample_ids=numbers, pause_ids=PAUSES, plan=plan)


def runs_of(sample: dict[str, Tensor]) -> list[list[int]]:
    """Positions of each target's run, found by walking back, in the order of positions."""
    tokens, segments, found = sample["tokens"].tolist(), sample["segments"].tolist(), []
    for position in range(LENGTH):
        if not sample["loss_mask"][position]:
            continue
        run = [position]
        while tokens[run[0]] in PAUSES and run[0] > 0 and segments[run[0] - 1] == segments[run[0]]:
            run.insert(0, run[0] - 1)
        found.append(run)
    return found


def term_by_hand(name: str, logits: Tensor, hidden: Tensor, target: int, weight: float) -> tuple[Tensor, float]:
    """Term and weight of one target from the logits [steps, vocabulary] of its run, by the formula, one by one."""
    section, steps = SECTIONS[name], len(logits)
    log_p = logits.log_softmax(dim=1)[:, target]
    squares = torch.logsumexp(logits, dim=1) ** 2
    if name in ("weights", "z_loss"):
        return weight * (-log_p[-1] + section.z_loss * squares[-1]), weight
    if name == "own":
        full = logits[-1].log_softmax(dim=0)
        entropy = -(full.exp() * full).sum()
        return weight * (-log_p[-1] + 0.2 * entropy + 0.1 * hidden[-1].square().mean()), weight
    if name == "anytime":
        factors = [weight * 0.7**s for s in range(steps)]
        return sum(-f * p for f, p in zip(factors, log_p, strict=True)), sum(factors)
    answers = [s_logits[:TEXT_SIZE].log_softmax(dim=0)[target] for s_logits in logits]
    with_request = logits[:, : TEXT_SIZE + 1].softmax(dim=1)
    stay, likelihood, expected = logits.new_ones(()), 0.0, 0.0
    for s in range(steps):
        d = with_request[s, TEXT_SIZE] if s < steps - 1 else logits.new_zeros(())
        p = with_request[s, target] if s < steps - 1 else answers[s].exp()
        q = (1 - d) * stay
        likelihood = likelihood + 0.8**s * p * stay
        if name == "cyb_variational":
            prior = 0.3 * 0.7**s if s < steps - 1 else 0.7**s
            expected = expected + q * (-answers[s] + torch.log(q / prior))
        elif name == "cyb_budget":
            expected = expected + q * (-answers[s] + 0.2 * s)
        stay = stay * d
    if name == "cyb_anytime":
        return weight * (-torch.log(likelihood) + section.z_loss * squares[-1]), weight
    return weight * expected, weight


def build(tensor: ParallelSection, plan: LossPlan | None, chunk: int, tied: bool = True):
    from pause_megatron.model import Vocabulary, build_model

    return build_model(
        section(head_chunk=chunk, tied=tied, init_std=0.1),
        vocabulary=Vocabulary(TEXT_SIZE, tuple(PAUSES)),
        sequence_length=LENGTH,
        parallel=tensor,
        seed=5,
        objective=None if plan is None else plan.objective,
    )


def by_hand(name: str, numbers: list[int]) -> tuple[float, float, dict[str, Tensor]]:
    """Objective, mean cross-entropy at the last steps, and gradient over windows, in fp64."""
    from pause_megatron.model.variable_length import PackedSegments

    plan, total, weights, losses = plan_of(name), 0.0, 0.0, []
    model = build(ParallelSection(), None, 4096, tied=name != "cyb_budget").double()
    for number in numbers:
        sample = sample_of(LAYOUTS[number % 4], number)
        spans = PackedSegments.of(sample["segments"][None], None, device=torch.device("cpu"))
        inputs = sample["tokens"][None], sample["position_ids"][None], spans
        logits, hidden = model.logits(*inputs)[0], model.hidden_states(*inputs)[:, 0]
        for run in runs_of(sample):
            target = int(sample["labels"][run[-1]])
            weight = 1.0
            if plan.token_weights == "side":
                weight = float(sample["weights"][run[-1]])
            elif name == "weights":
                weight = float(odd_ids_weigh_more(np.array([target]))[0])
            term, its = term_by_hand(name, logits[run], hidden[run], target, weight)
            total, weights = total + term, weights + its
            last = logits[run[-1], :TEXT_SIZE] if name.startswith("cyb") else logits[run[-1]]
            losses.append(float(-last.log_softmax(dim=0)[target]))
    (total / weights).backward()
    return float(total / weights), sum(losses) / len(losses), take_gradients(model)


def trained(name: str, micro_batches: list[list[int]], parallel: ParallelSection, chunk: int) -> tuple:
    """The same from the model and the sums of the training loop, over data-parallel ranks and micro-batches.

    The layers are in fp64, so that nothing but the head differs: an objective's numbers are fp32 in any model.
    """
    from pause_megatron.distributed import initialize
    from pause_megatron.train.guards.signals import StopRequest
    from pause_megatron.train.loop import _StepSums

    with initialize(parallel, device="cpu") as context:
        plan = plan_of(name)
        model = build(parallel, plan, chunk, tied=name != "cyb_budget").double()
        own = [micro_batch(each, plan) for each in micro_batches[context.dp_rank :: context.dp_size]]
        sums = _StepSums(own, context, (), StopRequest(), 1.0, plan)
        for batch in own:
            sums.losses.forward(model, batch, (1 / sums.counts[0]).float()).backward()
        *_, losses = sums.parse(sums.reduced().tolist())
        gradients = take_gradients(model)
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=context.dp_group)
        return losses, whole(model, gradients, context.tp_group)


UNEVEN = [[0, 1, 2], [3], [2, 3], [1]]


@pytest.mark.parametrize("name", SECTIONS)
def test_value_and_gradient_are_those_of_the_formula(name):
    numbers = [number for each in UNEVEN for number in each]
    value, mean, gradient = run_on_ranks(1, by_hand_on_a_rank, name, numbers)[0]
    cases: list[tuple[int, ParallelSection, int]] = [
        *((1, ParallelSection(), chunk) for chunk in (1, 7, 4096)),
        (2, ParallelSection(), 7),
        *((2, ParallelSection(tensor=2, sequence=sequence), 7) for sequence in (False, True)),
    ]
    for ranks, parallel, chunk in cases:
        for losses, found in run_on_ranks(ranks, trained, name, UNEVEN, parallel, chunk):
            case = f"{parallel.tensor} {parallel.sequence} {chunk}"
            assert losses.objective == pytest.approx(value, rel=1e-6), case
            assert losses.mean == pytest.approx(mean, rel=1e-6), case
            assert distance(found, gradient) < 1e-6, case
            assert losses.of_objective().keys() == {"objective", *(f"objective/{n}" for n in losses.means)}


def by_hand_on_a_rank(name: str, numbers: list[int]) -> tuple[float, float, dict[str, Tensor]]:
    from pause_megatron.distributed import initialize

    with initialize(ParallelSection(), device="cpu"):
        return by_hand(name, numbers)
