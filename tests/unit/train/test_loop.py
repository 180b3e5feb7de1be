"""The loop around the steps: when it stops, and the times that it reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pause_megatron.config.load import load
from pause_megatron.config.schema import ObjectiveSection
from pause_megatron.data.batches.batch import MicroBatch
from pause_megatron.engine import StepOutcome
from pause_megatron.model import LMLoss
from pause_megatron.objective import Steps, loss_plan
from pause_megatron.train.loop import Progress, StepResult, StepSchedule, training_steps

ALONE = SimpleNamespace(device=torch.device("cpu"), world_size=1, dp_group=None)
STEPS = 6


class Engine:
    """Takes no steps, but asks for its numbers when a step has been computed."""

    def __init__(self, during: Callable[[int], None] = lambda step: None) -> None:
        self.taken, self._during = 0, during

    def train_step(self, micro_batches, forward, *, lr, global_targets, read) -> StepOutcome:
        self.taken += 1
        self._during(self.taken)
        assert float(global_targets) == sum(batch.targets_count for batch in micro_batches)
        return StepOutcome(1.0, True, read().tolist())


def micro_batch(rows: int) -> MicroBatch:
    return MicroBatch(
        tokens=torch.zeros(2, 8, dtype=torch.int64),
        position_ids=torch.arange(8).expand(2, 8),
        target_rows=torch.arange(rows),
        targets=torch.zeros(rows, dtype=torch.int64),
        after_pause=torch.zeros(rows, dtype=torch.bool),
        sample_ids=torch.arange(2),
        pause_tokens=3,
    )


def steps(engine: Engine, stop: list, batches: Iterator | None = None, **options) -> Iterator[StepResult]:
    config = load(overrides=[f"train.steps={STEPS}", "optim.warmup_steps=1"])
    read = ((step, [micro_batch(5), micro_batch(7)]) for step in range(STEPS))
    return training_steps(
        engine,
        read if batches is None else batches,
        ALONE,
        StepSchedule(config.optim, STEPS),
        stop,  # only its truth is read
        **options,
    )


def test_counts_are_those_of_the_step():
    results = list(steps(Engine(), []))
    assert [result.step for result in results] == list(range(1, STEPS + 1)) and results[-1].last
    assert {(result.tokens, result.text_tokens) for result in results} == {(32, 26)}
    assert results[-1].progress == Progress(STEPS, STEPS * 32, STEPS * 26)


class OneOfEach(Engine):
    """Computes a loss of 1 at each target, and no objective."""

    def train_step(self, micro_batches, forward, *, lr, global_targets, read) -> StepOutcome:
        def module(*_, targets, **__):
            count, none = targets.numel(), torch.zeros((), dtype=torch.float64)
            return LMLoss(torch.zeros(()), torch.zeros(()), count, torch.ones(count), None, none, none.new_zeros(0, 2))

        for batch in micro_batches:
            forward(module, batch, torch.ones(()))
        assert float(global_targets) == sum(batch.weight for batch in micro_batches)
        return StepOutcome(1.0, True, read().tolist())


def test_a_step_whose_targets_have_weight_0_has_a_loss_and_no_objective():
    ones, ends = torch.ones(5, dtype=torch.int64), torch.arange(1, 6).numpy()
    batches = []
    for weight in (0.0, 2.0):
        weights = Steps(torch.arange(5), ones, ones < 0, ones * weight, ends, 5 * weight)
        batches.append(replace(micro_batch(5), steps=weights))
    plan = loss_plan(ObjectiveSection(token_weights="side"))
    read = enumerate([[batches[0], batches[0]], [batches[0], batches[1]]])
    first, second = (result.losses for result in steps(OneOfEach(), [], read, plan=plan))
    assert (first.mean, first.objective, first.is_weightless) == (1.0, None, True)
    assert (second.mean, second.objective, second.is_weightless) == (1.0, 0.0, False)


def test_a_request_before_the_first_step_stops_before_it():
    engine = Engine()
    assert list(steps(engine, ["now"])) == [] and engine.taken == 0


def test_a_request_during_a_step_lets_it_be_the_last():
    stop: list = []
    engine = Engine(lambda step: stop.append("now") if step == 3 else None)
    assert [result.step for result in steps(engine, stop)] == [1, 2, 3] and engine.taken == 3


@pytest.mark.parametrize(("after", "last"), [(2, 3), (4, 4)])
def test_a_request_in_a_hook_stops_at_once_where_hooks_take_long(after, last):
    """After a validation or a save (every fourth step here); behind a short hook one more step is taken."""
    stop: list = []
    taken = []
    for result in steps(Engine(), stop, long_hooks=(0, 4)):
        taken.append(result.step)
        if result.step == after:
            stop.append("now")
    assert taken[-1] == last


def test_the_times_of_all_steps_leave_nothing_out(monkeypatch):
    """A slow loader, slow steps and slow hooks, by a clock that only they move: their sum is the time on the wall."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_seconds(seconds: float) -> None:
        now[0] += seconds

    def slow_batches():
        for step in range(STEPS):
            pass_seconds(2.0)
            yield step, [micro_batch(5)]

    results = []
    for result in steps(Engine(lambda step: pass_seconds(3.0)), [], slow_batches()):
        results.append(result)
        wall = now[0] - 100.0
        pass_seconds(result.step)
    assert sum(r.seconds + r.hook_seconds for r in results) == wall
    assert [(r.loader_seconds, r.seconds) for r in results] == [(2.0, 5.0)] * STEPS
    assert [r.hook_seconds for r in results] == list(range(STEPS))
