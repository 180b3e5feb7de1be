"""Result of a benchmark as a table of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from pause_megatron.benchmark.record import Measurement
from pause_megatron.config.gpus import GIB
from pause_megatron.config.quantities import scaled

COLUMNS = 100
_NAME = 12  # columns of the names in the first part


def as_table(result: Measurement) -> str:
    """Return a measurement as a table, with the longest kernels at its end.

    Args:
        result: Result of a benchmark.
    """
    lines = [
        line
        for name, text in _rows(result)
        for line in textwrap.wrap(
            text, COLUMNS, initial_indent=f"{name:{_NAME}}  ", subsequent_indent=" " * (_NAME + 2)
        )
    ]
    return "\n".join([*lines, *_kernels(result)])


def _rows(result: Measurement) -> Iterable[tuple[str, str]]:
    config, batch, machine, median = result.config, result.batch, result.machine, result.median_seconds
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items() if version)
    yield "machine", f"{machine.ranks} {'rank' if machine.ranks == 1 else 'ranks'} on {_device(result)}"
    yield "versions", f"python {machine.python}, {packages}"
    sequence = " with sequence parallelism" if config.parallel.sequence else ""
    yield (
        "model",
        f"{result.parameters:,} parameters, {config.engine.precision}, ZeRO stage {result.stage}, {result.kernels} "
        "kernels",
    )
    yield (
        "batch",
        f"{batch.global_size:,} windows of {batch.sequence_length:,} tokens = {batch.micro_size} micro x "
        f"{batch.accumulation} accumulation x {batch.data_parallel} data parallel; {batch.tensor} tensor parallel"
        f"{sequence}; {result.windows}",
    )
    yield "start-up", _start_up(result)
    yield (
        "step",
        f"{_duration(median)} in the median of {len(result.step_seconds)} ({_duration(min(result.step_seconds))} to "
        f"{_duration(max(result.step_seconds))}), after {result.warmup_steps} of warm-up",
    )
    yield "raw tokens", f"{result.raw_tokens / median:,.0f} tokens/s ({result.raw_tokens:,.0f} a step)"
    yield (
        "text tokens",
        f"{result.text_tokens / median:,.0f} tokens/s ({result.text_tokens:,.0f} a step, "
        f"{result.targets:,.0f} targets)",
    )
    yield "FLOPs", f"{scaled(result.flops)}FLOP a step, {scaled(result.flops_per_second)}FLOP/s a rank"
    yield "MFU", _mfu(result)
    yield "memory", _memory(result)
    yield "host waits", _waits(result)


def _device(result: Measurement) -> str:
    machine = result.machine
    if machine.cuda_name is None:
        return "a CPU"
    return machine.cuda_name + (f" ({machine.gpu})" if machine.gpu else "")


def _start_up(result: Measurement) -> str:
    took = result.start_up
    return (
        f"process groups {_duration(took.groups)}, windows {_duration(took.windows)}, model {_duration(took.model)}, "
        f"engine {_duration(took.engine)}"
    )


def _mfu(result: Measurement) -> str:
    if result.mfu is None or result.peak_flops is None:
        device = "a CPU" if result.machine.cuda_name is None else f"this device in {result.config.engine.precision}"
        return f"unknown: no peak of {device} in the table; give log.peak_tflops=N"
    return f"{result.mfu:.1%} of {result.peak_flops / 1e12:,.5g} TFLOP/s a rank"


def _memory(result: Measurement) -> str:
    memory = result.memory
    text = (
        f"{_size(memory.peak_bytes)} of tensors at the peak, {_size(memory.planned_bytes)} planned "
        f"({memory.peak_bytes / memory.planned_bytes - 1:+.1%})"
    )
    return text if memory.reserved_bytes is None else f"{text}; {_size(memory.reserved_bytes)} reserved"


def _waits(result: Measurement) -> str:
    text = f"{result.waits.per_micro_batch:.3g} a micro-batch, {result.waits.per_step:.3g} a step besides"
    if result.machine.cuda_name is None:
        text += " (on a CPU, where the host's own tensors count too)"
    return text


def _kernels(result: Measurement) -> list[str]:
    if not result.kernels_by_time:
        return []
    what = "operators" if result.machine.cuda_name is None else "kernels"
    rows = [f"{'time a step':>11}  {'share':>6}  {'calls':>7}  {what} of one step"]
    for kernel in result.kernels_by_time:
        row = f"{_duration(kernel.seconds):>11}  {kernel.share:6.1%}  {kernel.calls:7,}  {kernel.name}"
        rows.append(row if len(row) <= COLUMNS else row[: COLUMNS - 3] + "...")
    return ["", *rows]


def _size(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
