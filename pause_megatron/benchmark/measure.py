"""Measurement of training steps with the model, engine, loader and loop of a run; nothing is saved."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch

from pause_megatron.benchmark.kernels import Profile, profiling
from pause_megatron.benchmark.machine import Machine
from pause_megatron.benchmark.record import Measurement, Memory, StartUp, Waits
from pause_megatron.benchmark.tensors import held_bytes
from pause_megatron.benchmark.windows import windows_of
from pause_megatron.config.batching import batch_plan
from pause_megatron.config.gpus import device_peak_flops
from pause_megatron.config.presets import parameters, step_flops
from pause_megatron.config.schema import ResolvedConfig, ScheduledConfig
from pause_megatron.distributed import ParallelContext, initialize
from pause_megatron.distributed.collective import gather_objects
from pause_megatron.distributed.context import started_ranks
from pause_megatron.distributed.settings import settings_of
from pause_megatron.engine import Engine
from pause_megatron.engine.waits import MICRO_BATCH, STEP, HostWaits
from pause_megatron.model import PauseGPTModel, parameter_groups
from pause_megatron.model.kernels import choose_implementation
from pause_megatron.objective import loss_plan
from pause_megatron.plan.layout import Device, Layout
from pause_megatron.plan.memory import rank_memory
from pause_megatron.train.guards.same_run import run_record
from pause_megatron.train.guards.signals import StopRequest
from pause_megatron.train.guards.watch import HangWatch, collective_timeout
from pause_megatron.train.inputs.inputs import TrainingData
from pause_megatron.train.logs.monitoring import ProgressBar
from pause_megatron.train.loop import Progress, StepResult, StepSchedule, training_steps
from pause_megatron.train.run import new_engine, new_model, step_loader

log = logging.getLogger(__name__)

EXTRA_STEPS = 2  # after the timed steps: one is profiled, in one host synchronizations are counted


@dataclass(frozen=True)
class Sizes:
    """The extent of a benchmark.

    Attributes:
        steps: Timed steps.
        warmup: Steps before them.
        top: Kernels to list.
        text_size: Ids of synthetic text.
    """

    steps: int = 10
    warmup: int = 3
    top: int = 10
    text_size: int = 32_000

    @property
    def all_steps(self) -> int:
        """Number of all steps."""
        return self.warmup + self.steps + EXTRA_STEPS


@dataclass(frozen=True)
class _Steps:
    """Measurements of the steps.

    Attributes:
        ends: End of the warm-up, then of each timed step, seconds.
        results: Results of the timed steps.
        memory: Peak and reserved bytes on a GPU; None on a CPU.
        profile: Result of the profiled step.
        waits: Host synchronizations of the last step.
    """

    ends: list[float]
    results: list[StepResult]
    memory: tuple[int | None, int | None]
    profile: Profile
    waits: Waits


@dataclass(frozen=True)
class _Setup:
    """The parts of a run that are measured."""

    config: ScheduledConfig
    data: TrainingData
    model: PauseGPTModel
    engine: Engine
    context: ParallelContext


def run_benchmark(config: ResolvedConfig, sizes: Sizes) -> Measurement:
    """Train for a few steps and measure them. Every rank calls this; rank 0 has the result.

    Args:
        config: Resolved configuration; its `model.from` is not read, initial weights are random.
        sizes: Extent of the benchmark.

    Raises:
        PauseMegatronError: The configuration, corpus or task cannot be used.
    """
    clock = _Clock()
    with (
        settings_of(config),
        initialize(
            config.parallel,
            timeout=collective_timeout(config),
            connect_seconds=config.run.connect_seconds,
            same=run_record("benchmark", config, started_ranks()),
        ) as context,
        ExitStack() as closing,
    ):
        before = _reset_peak_memory(context)
        groups = clock.lap()
        running, data = windows_of(
            _with_steps(config, sizes), sizes.text_size, ranks=context.world_size, rank=context.rank
        )
        windows = clock.lap()
        log.info("building the model")
        model = new_model(running, data)
        built = clock.lap()
        weight_decay = 0.0 if running.train.only else running.optim.weight_decay
        engine = closing.enter_context(new_engine(running, model, parameter_groups(model, weight_decay), context))
        start_up = StartUp(groups, windows, built, clock.lap())
        setup = _Setup(running, data, model, engine, context)
        taken = _take(setup, sizes, closing)
        peak, reserved = taken.memory
        if taken.profile.tensor_bytes is not None:
            peak = taken.profile.tensor_bytes - before
        memory = _largest(setup, peak, reserved)
        return _measurement(config, setup, sizes, start_up, taken, memory)


def _with_steps(config: ResolvedConfig, sizes: Sizes) -> ResolvedConfig:
    """Return the configuration with enough steps, from step 1 on, and without validation."""
    lengths: dict[str, int | None] = {"extended_from": None}
    if config.finetune.epochs is None:
        steps = max(config.train.steps or 0, sizes.all_steps)
        lengths |= {"steps": steps, "tokens": steps * config.batch.global_size * config.data.sequence_length}
    train, validation = config.train.model_copy(update=lengths), config.validation.model_copy(update={"every": 0})
    return config.model_copy(update={"train": train, "validation": validation})


def _take(setup: _Setup, sizes: Sizes, closing: ExitStack) -> _Steps:
    """Take the warm-up, the timed steps, one under the profiler, and one that counts host synchronizations."""
    config, data, engine, context = setup.config, setup.data, setup.engine, setup.context
    stream = closing.enter_context(data.stream(context, None)) if data.stream else None
    batches = closing.enter_context(step_loader(config, data, context, Progress(), stream, end=sizes.all_steps))
    watch = closing.enter_context(HangWatch(config.run.hang_seconds, context))
    bar = ProgressBar(sizes.all_steps, 0) if context.rank == 0 else None
    if bar is not None:
        closing.callback(bar.close)
    steps = training_steps(
        engine,
        batches,
        context,
        StepSchedule(config.optim, max(config.train.steps, sizes.all_steps)),
        StopRequest(),  # without signal handlers: there is nothing to save
        corpora=data.names,
        hint_weight=config.finetune.hint_weight,
        plan=loss_plan(config.objective),
    )

    def take(number: int) -> Iterator[StepResult]:
        for _ in range(number):
            result = next(steps)
            watch.beat(f"step {result.step} done")
            if bar is not None:
                bar(result)
            yield result

    for _ in take(sizes.warmup):
        pass
    # The loop alone synchronizes with the device between steps; the first and the last time are exact.
    _synchronize(context)
    ends, results = [time.perf_counter()], list[StepResult]()
    for result in take(sizes.steps):
        if len(results) == sizes.steps - 1:
            _synchronize(context)
        ends.append(time.perf_counter())
        results.append(result)
    memory = _memory_of_cuda(context)
    with profiling(context.device) if context.rank == 0 else nullcontext(Profile()) as profile:
        for _ in take(1):
            pass
    with HostWaits(context.device) as counted:
        for _ in take(1):
            pass
    accumulation = batch_plan(config, context.world_size).accumulation
    waits = Waits(counted.per(MICRO_BATCH, accumulation), counted.per(STEP, 1))
    return _Steps(ends, results, memory, profile, waits)


def _measurement(
    config: ResolvedConfig, setup: _Setup, sizes: Sizes, start_up: StartUp, taken: _Steps, memory: Memory
) -> Measurement:
    context, vocabulary, machine = setup.context, setup.model.vocabulary, Machine.of(setup.context)
    tokens = [result.tokens for result in taken.results]
    targets = [result.losses.targets for result in taken.results]
    rows = sum(result.losses.head_rows for result in taken.results)
    flops = step_flops(config.model, vocabulary.size, config.data.sequence_length, tokens=sum(tokens), targets=rows)
    count = len(taken.results)
    return Measurement(
        config=config,
        batch=batch_plan(config, context.world_size),
        stage=setup.engine.deepspeed.zero_optimization_stage(),
        parameters=parameters(config.model, vocabulary.size),
        vocabulary=vocabulary.size,
        windows=_described(config, setup.data),
        machine=machine,
        kernels=choose_implementation(config.engine.kernels, context.device),
        warmup_steps=sizes.warmup,
        step_seconds=tuple(end - begin for begin, end in zip(taken.ends, taken.ends[1:], strict=False)),
        raw_tokens=sum(tokens) / count,
        text_tokens=sum(result.text_tokens for result in taken.results) / count,
        targets=sum(targets) / count,
        flops=round(flops / count),
        peak_flops=device_peak_flops(config, machine.cuda_name),
        memory=memory,
        waits=taken.waits,
        kernels_by_time=tuple(taken.profile.kernels[: sizes.top]),
        start_up=start_up,
    )


def _reset_peak_memory(context: ParallelContext) -> int:
    """Reset the GPU's peak statistics; return the bytes of live tensors on a CPU."""
    if context.device.type == "cpu":
        return held_bytes()
    torch.cuda.reset_peak_memory_stats(context.device)
    return 0


def _memory_of_cuda(context: ParallelContext) -> tuple[int | None, int | None]:
    """Return the peak bytes of tensors and the peak that the allocator reserved; None on a CPU."""
    if context.device.type == "cpu":
        return None, None
    return torch.cuda.max_memory_allocated(context.device), torch.cuda.max_memory_reserved(context.device)


def _largest(setup: _Setup, peak: int | None, reserved: int | None) -> Memory:
    """Return the maximum over the ranks that measured theirs. Every rank calls this."""
    config, context = setup.config, setup.context
    layout = Layout.of(config, context.world_size, setup.model.vocabulary.size - config.pause.embeddings)
    every = gather_objects((peak, reserved))
    device: Device = "cuda" if context.device.type == "cuda" else "cpu"
    return Memory(
        peak_bytes=max(peak for peak, _ in every if peak is not None),
        reserved_bytes=max((reserved for _, reserved in every if reserved is not None), default=None),
        planned_bytes=rank_memory(layout, device).peak_bytes,
    )


def _described(config: ResolvedConfig, data: TrainingData) -> str:
    if config.task.name is not None:
        return f"task {config.task.name}"
    return " ".join(config.data.prefix or config.data.source) or data.description


class _Clock:
    """A stopwatch with laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


def _synchronize(context: ParallelContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
