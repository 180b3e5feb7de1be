"""Hooks and the metrics file, on results made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pause_megatron.config.load import load
from pause_megatron.errors import TrainingError
from pause_megatron.train.hooks import BestEffort, Every, Monitor, SkippedStepLimit, WeightlessSteps
from pause_megatron.train.logs.metrics_file import MetricsFile, Throughput
from pause_megatron.train.logs.monitoring import ProgressBar, validation_text
from pause_megatron.train.logs.tensorboard import TensorBoard
from pause_megatron.train.loop import Progress, StepResult
from pause_megatron.train.losses import Losses, LossSums
from pause_megatron.train.validation import validation_losses

ALONE = SimpleNamespace(device=torch.device("cpu"), world_size=1, dp_group=None)


def result(step: int, *, applied: bool = True, last: bool = False) -> StepResult:
    return StepResult(
        progress=Progress(step, 100 * step, 90 * step),
        losses=Losses.from_sums(30.0, 0.0, 10, 0),
        grad_norm=1.0 if applied else math.nan,
        lr=0.1,
        applied=applied,
        tokens=100,
        text_tokens=90,
        seconds=0.5,
        loader_seconds=0.1,
        hook_seconds=0.2,
        sample=None,  # no hook of these tests shows it
        last=last,
    )


def flops(tokens: int, targets: int) -> float:
    return 1e9 * tokens + 3e8 * targets


def test_mfu_counts_the_rows_that_are_computed(monkeypatch):
    """Of the output layer only those with a target; a given peak goes before that of the GPU."""
    config = load(overrides=["model.preset=130m", "data.sequence_length=2048", "log.peak_tflops=100"])
    context = SimpleNamespace(device=torch.device("cuda"), world_size=2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    rates = Throughput.of(config, 32_001, context).rates(result(1))
    layers = 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 768
    expected = (6 * layers + 12 * 12 * 768 * 2048) * 100 + 6 * 32_001 * 768 * 10
    assert rates["mfu"] == pytest.approx(expected / 0.5 / (2 * 100e12))


def steps_seen(hook_options: dict, total: int = 7, stop_at: int | None = None) -> list[int]:
    seen: list[int] = []
    hook = Every(action=lambda r: seen.append(r.step), **hook_options)
    for step in range(1, (stop_at or total) + 1):
        hook(result(step, last=step == total))
    if stop_at:
        hook.on_stop(result(stop_at))
    return seen


def test_when_an_action_is_due():
    assert steps_seen({"steps": 3}) == [3, 6, 7]
    assert steps_seen({"steps": 3, "at_end": False}) == [3, 6]
    assert steps_seen({"steps": 0}) == [7]
    assert steps_seen({"steps": 3}, stop_at=5) == [3]
    assert steps_seen({"steps": 3, "on_stop": True}, stop_at=5) == [3, 5]
    assert steps_seen({"steps": 3, "on_stop": True}, stop_at=6) == [3, 6]


def test_a_run_ends_after_too_many_skipped_steps_in_a_row():
    limit = SkippedStepLimit(3)
    for step, applied in enumerate((False, False, True, False, False), start=1):
        limit(result(step, applied=applied))
    with pytest.raises(TrainingError, match="3 steps in a row were not finite"):
        limit(result(6, applied=False))


def test_steps_of_weight_0_are_told_at_the_1st_10th_and_100th_and_in_the_end(tmp_path, caplog):
    with_weight = replace(result(1).losses, rows=10, objective=2.0)
    hook, file = WeightlessSteps(), MetricsFile(tmp_path / "metrics.jsonl", Throughput(flops, None), resume_after=0)
    for step in range(1, 31):
        objective = None if step % 2 == 0 else 2.0
        hook(now := replace(result(step), losses=replace(with_weight, objective=objective)))
        if step < 3:
            file(now)
    file.close()
    said = [message.partition(" steps have targets of weight 0 only")[0] for message in caplog.messages]
    assert said == ["step 2: 1 of 2", "step 20: 10 of 20"]
    assert hook.failure().startswith("15 of 30 steps have targets of weight 0 only (objective.token_weights,")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["loss"], line["objective"]) for line in lines] == [(3.0, 2.0), (3.0, None)]
    hook = WeightlessSteps()
    for losses in (with_weight, result(1).losses):  # the default objective has no rows
        hook(replace(result(1), losses=losses))
    assert hook.failure() is None


def test_metrics_are_whole_lines_and_a_resumed_run_repeats_its_steps(tmp_path):
    path, rates = tmp_path / "metrics.jsonl", Throughput(flops, peak_flops=1e12)
    file = MetricsFile(path, rates, resume_after=0)
    for step in range(1, 5):
        file(result(step))
    file.close()
    with path.open("a") as broken:
        broken.write('{"step": 5, "lo')  # a kill in the middle of a line
    file = MetricsFile(path, rates, resume_after=2)
    file(result(3))
    file.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["tokens_per_second"] == 200.0 and lines[0]["text_tokens_per_second"] == 180.0
    assert lines[0]["mfu"] == pytest.approx(flops(100, 10) / 0.5 / 1e12)
    assert (lines[0]["seconds"], lines[0]["loader_seconds"], lines[0]["hook_seconds"]) == (0.5, 0.1, 0.2)
    assert lines[0]["loss"] == 3.0 and lines[0]["loss_after_pause"] is None
    assert lines[0]["pause_fraction"] == pytest.approx(0.1)


class Fickle(Monitor):
    """Fails at some of its calls: "open", "close", or a step's number."""

    def __init__(self, *failing: str | int) -> None:
        self.failing, self.asked = set(failing), []

    def open(self) -> None:
        self._do("open")

    def __call__(self, now: StepResult) -> None:
        self._do(now.step)

    def close(self) -> None:
        self._do("close")

    def _do(self, what: str | int) -> None:
        self.asked.append(what)
        if what in self.failing:
            raise (OSError(28, "No space left on device") if what != 2 else RuntimeError(f"no {what}"))


@pytest.mark.parametrize(
    ("failing", "lost"),
    [
        ([], None),
        (["open"], None),  # made good
        (["close"], "log could not be written (No space left on device)"),
        (["open", "close"], "log could not be written (No space left on device)"),
        ([2, 3], "log: 2 of 4 lines could not be written (RuntimeError: no 2)"),
        (["open", 1, 2, 3, 4, "close"], "log: 4 of 4 lines could not be written (No space left on device)"),
    ],
)
def test_a_failing_monitor_is_logged_once_called_again_and_counted(failing, lost, caplog):
    monitor = Fickle(*failing)
    hook = Every(1, BestEffort("log", "lines", monitor))
    for step in range(1, 5):
        hook(result(step))
    hook.close()
    assert monitor.asked == ["open", 1, 2, 3, 4, "close"]
    assert hook.failure() == lost
    assert len(caplog.messages) == bool(failing)


def test_an_exception_of_an_action_without_best_effort_ends_the_run():
    def invalid(now: StepResult) -> None:
        raise TrainingError("validation failed")

    with pytest.raises(TrainingError):
        Every(1, invalid)(result(1))


def test_losses_are_split_by_the_token_before_them():
    sums = LossSums(torch.device("cpu"))
    sums.add(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, False]))
    sums.add(torch.tensor([5.0]), torch.tensor([True]))
    sums.add(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert sums.totals(ALONE) == Losses(mean=11 / 4, after_pause=3.0, elsewhere=2.5, targets=4, after_pause_targets=2)


def test_losses_of_the_corpora_of_a_blend():
    sums = LossSums(torch.device("cpu"), ("c4", "wiki", "code"))
    sums.add(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, dtype=torch.bool), torch.tensor([0, 1, 0]))
    sums.add(torch.tensor([6.0]), torch.zeros(1, dtype=torch.bool), torch.tensor([0]))
    losses = sums.totals(ALONE)
    assert (losses.by_corpus["c4"], losses.by_corpus["wiki"], losses.mean) == (10 / 3, 2.0, 3.0)
    assert losses.by_corpus["code"] is None
    assert LossSums(torch.device("cpu")).totals(ALONE).by_corpus == {}


def test_a_run_without_pauses_logs_no_loss_after_pauses(tmp_path, caplog):
    """On the terminal, in metrics.jsonl and in TensorBoard; a non-finite loss is logged, but not plotted."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rates = Throughput(flops, peak_flops=None)
    file = MetricsFile(tmp_path / "metrics.jsonl", rates, resume_after=0)
    board = TensorBoard(tmp_path / "tensorboard", rates, resume_after=0, config_yaml="", show=str)
    bar = ProgressBar(2, 0)
    for step, total in ((1, 30.0), (2, math.nan)):
        plain = Losses.from_sums(total, 0.0, 10, 0)
        now = result(step, last=step == 2).with_metrics(validation_losses(plain, plain))
        for hook in (file, board, bar):
            hook(now)
    for hook in (file, board, bar):
        hook.close()
    said = caplog.messages
    assert said[1] == "step 1: valid_loss 3.0000 nats" and said[3].startswith("step 2: valid_loss nan nats")
    first, second = (
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )
    assert (first["valid_loss"], first["valid_loss_after_pause"], first["valid_loss_elsewhere"]) == (3.0, None, 3.0)
    assert second["valid_loss"] is None
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    drawn = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert drawn["time/step_seconds"] == [0.5, 0.5] and drawn["time/hook_seconds"] == pytest.approx([0.2, 0.2])
    assert "loss/valid_after_pause" not in drawn and drawn["loss/valid"] == [3.0]
    assert all(math.isfinite(value) for values in drawn.values() for value in values)


def test_tokens_per_second_are_those_since_the_previous_line(caplog):
    bar = ProgressBar(4, 0)
    for step, seconds in enumerate((0.1, 0.1, 3.7, 0.2), 1):
        bar(replace(result(step, last=step == 4), seconds=seconds))
    bar.close()
    first, last = caplog.messages
    assert first.startswith("step 1/4: ") and " 1.0k tokens/s, " in first
    assert last.startswith("step 4/4: ") and " 0.1k tokens/s, " in last  # 300 tokens in 4.0 s


def test_parts_of_a_validation_that_exist_and_differ_are_shown():
    losses = {"valid_loss": 2.0, "valid_loss_after_pause": 3.0, "valid_loss_elsewhere": 1.5, "valid_loss/c4": None}
    assert validation_text(losses) == "valid_loss 2.0000 nats (after_pause 3.0000, elsewhere 1.5000)"
