"""Plans as a table with one column for each kind of GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from pause_megatron.config.gpus import GIB
from pause_megatron.config.quantities import scaled
from pause_megatron.plan.machine import SPEEDS
from pause_megatron.plan.plan import Plan

MIB = 2**20
Row = tuple[str, Callable[[Plan], str]]
# Kinds of `RankMemory.phases` and their names in the table.
_KINDS = {
    "weights": "weights",
    "gathered parameters": "gathered parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "head": "logits of a chunk, head gradient",
    "buffers": "buffers",
    "batches": "batches",
}


def as_table(plans: Sequence[Plan]) -> str:
    """Return plans side by side, then communication, assumptions, warnings and remedies.

    Args:
        plans: Plans of one run, one for each kind of GPU.
    """
    lines = _aligned([(name, *(cell(plan) for plan in plans)) for name, cell in _rows(plans)])
    lines += ["", *_traffic(plans[0]), "", *_assumptions(plans), ""]
    lines += [f"warning: {text}" for text in plans[0].warnings]
    for plan in plans:
        lines += _verdict(plan)
    return "\n".join(lines).rstrip()


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return rows as lines, the first column aligned left and the others right."""
    first, *others = ([len(cell) for cell in column] for column in zip(*rows, strict=True))
    widths = [max(column) for column in others]
    return [
        f"{name:{max(first)}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, *cells in rows
    ]


def _rows(plans: Sequence[Plan]) -> list[Row]:
    offloads = any(plan.memory.host_bytes for plan in plans)
    rows: list[Row] = [
        ("GPU", lambda plan: plan.cluster.gpu.name),
        ("ranks", lambda plan: f"{plan.cluster.nodes} x {plan.cluster.gpus_per_node} = {plan.cluster.ranks}"),
        ("data x tensor parallel", lambda plan: f"{plan.layout.data_parallel} x {plan.layout.tensor}"),
        ("ZeRO stage", lambda plan: str(plan.layout.stage)),
        ("kernels (engine.kernels)", lambda plan: "fused" if plan.layout.fused else "plain"),
        ("global = micro x accumulation x data", _batch),
        ("parameters of a rank", lambda plan: f"{plan.layout.numel:,}"),
        *_memory_rows(plans, offloads),
        ("sent by a rank, a step", lambda plan: _bytes(sum(w.traffic.wire_bytes for w in plan.wires))),
        ("  of it to other nodes", lambda plan: _bytes(sum(w.inter_node_bytes for w in plan.wires))),
        ("FLOPs a step", lambda plan: f"{scaled(plan.time.model_flops)}FLOP"),
        ("step", lambda plan: _duration(plan.time.seconds)),
        ("  computing", lambda plan: _duration(plan.time.compute_seconds)),
        *_computing_rows(plans),
        ("  communication not hidden", lambda plan: _duration(plan.time.exposed_seconds)),
    ]
    if offloads:
        rows.append(("  offload", lambda plan: _duration(plan.time.offload_seconds)))
    return [*rows, *_run_rows(plans)]


def _memory_rows(plans: Sequence[Plan], offloads: bool) -> list[Row]:
    def kind(name: str) -> Callable[[Plan], int]:
        return lambda plan: plan.memory.phases[plan.memory.peak_phase].get(name, 0)

    def shown(size: Callable[[Plan], float]) -> Callable[[Plan], str]:
        return lambda plan: _bytes(size(plan))

    gathers = any(kind("gathered parameters")(plan) for plan in plans)
    rows: list[Row] = [
        ("memory is largest at", lambda plan: plan.memory.peak_phase),
        *(
            (f"  {shows}", shown(kind(name)))
            for name, shows in _KINDS.items()
            if gathers or not name.startswith("gath")
        ),
        ("  fragmentation margin", shown(lambda plan: plan.footprint.margin)),
        ("  context, libraries, NCCL", shown(lambda plan: plan.footprint.base)),
        *([("  of the tensors counted", _ratio)] if any(p.assumptions.memory_ratio for p in plans) else []),
        ("memory needed, a GPU", shown(lambda plan: plan.footprint.total)),
        ("memory there, a GPU", shown(lambda plan: plan.footprint.capacity)),
        ("fits", lambda plan: "yes" if plan.fits else "NO"),
        ("largest batch.micro_size that fits", lambda plan: str(plan.largest_micro_size or "none")),
        ("  with any global batch", lambda plan: str(plan.memory_micro_size or "none")),
    ]
    if offloads:
        rows.append(("memory of the host, a node", shown(lambda p: p.memory.host_bytes * p.cluster.gpus_per_node)))
    return rows


def _ratio(plan: Plan) -> str:
    ratio = plan.assumptions.memory_ratio
    return "-" if ratio is None else f"x {ratio.value:.3f}"


def _computing_rows(plans: Sequence[Plan]) -> list[Row]:
    """Return the time of computing by kind of kernel; no rows where an MFU was given or measured."""
    if any(plan.time.parts is None for plan in plans):
        return []
    shown = {
        "matrix products": "products",
        "attention": "attention",
        "memory-bound kernels": "memory",
        "sums of gradients, optimizer": "update",
        "waiting for the host": "waiting",
    }

    def part(field: str) -> Callable[[Plan], str]:
        return lambda plan: _duration(getattr(plan.time.parts, field))

    return [(f"    {name}", part(field)) for name, field in shown.items()]


def _run_rows(plans: Sequence[Plan]) -> list[Row]:
    every = plans[0].layout.config.checkpoint.every
    return [
        ("MFU while computing", lambda plan: f"{plan.computing_mfu:.1%}"),
        ("MFU of the step", lambda plan: f"{plan.mfu:.1%}"),
        ("raw tokens/s", lambda plan: f"{plan.layout.batch.raw_tokens / plan.time.seconds:,.0f}"),
        ("text tokens/s", lambda plan: f"{plan.layout.batch.text_tokens / plan.time.seconds:,.0f}"),
        ("budget, raw tokens", lambda plan: _budget(plan, plan.layout.batch.total_tokens)),
        ("  steps", lambda plan: _budget(plan, plan.layout.batch.steps)),
        ("  days", lambda plan: "-" if plan.run_seconds is None else f"{plan.run_seconds / 86400:,.2f}"),
        ("  which is", lambda plan: "-" if plan.run_seconds is None else _duration(plan.run_seconds)),
        ("  GPU-hours", _gpu_hours),
        ("checkpoint", lambda plan: _bytes(plan.saving.bytes)),
        ("  one save", lambda plan: _duration(plan.saving.seconds)),
        ("  the job fails once in", lambda plan: _duration(plan.saving.mtbf_seconds)),
        ("  best checkpoint.every", lambda plan: f"{plan.saving.every:,} steps"),
        ("  which is every", lambda plan: _duration(plan.saving.interval_seconds)),
        ("  time lost", lambda plan: f"{plan.saving.lost:.2%}"),
        (f"  time lost at checkpoint.every={every}", lambda plan: f"{plan.saving.lost_as_configured:.2%}"),
    ]


def _batch(plan: Plan) -> str:
    batch = plan.layout.batch
    return f"{batch.global_size} = {batch.micro_size} x {batch.accumulation} x {batch.data_parallel}"


def _budget(plan: Plan, number: int | None) -> str:
    if number is not None:
        return f"{number:,}"
    return "none given" if plan.layout.config.task.name is None else "by the examples"


def _gpu_hours(plan: Plan) -> str:
    return "-" if plan.run_seconds is None else f"{plan.run_seconds / 3600 * plan.cluster.ranks:,.0f}"


def _bytes(size: float) -> str:
    """Return a size in GiB, or in MiB below 0.01 GiB."""
    return f"{size / MIB:,.2f} MiB" if 0 < size < 0.01 * GIB else f"{size / GIB:,.2f} GiB"


def _duration(seconds: float) -> str:
    """Return a duration in days, hours, minutes, seconds or milliseconds."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3f} s" if seconds >= 0.1 else _milliseconds(seconds)


def _traffic(plan: Plan) -> list[str]:
    if not plan.wires:
        return ["no traffic: one rank"]
    header = (
        f"traffic of a step, {plan.cluster.gpu.name}",
        "operation",
        "ranks",
        "where",
        "tensors",
        "time",
        "exposed",
    )
    rows = [
        (
            f"  {wire.traffic.purpose}",
            wire.traffic.operation,
            f"{wire.traffic.ranks} {wire.traffic.group}",
            "between nodes" if wire.crosses_nodes else "inside a node",
            _bytes(wire.traffic.bytes),
            _milliseconds(wire.seconds),
            _milliseconds(wire.exposed_seconds),
        )
        for wire in plan.wires
    ]
    return _aligned([header, *rows])


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"


def _assumptions(plans: Sequence[Plan]) -> list[str]:
    lines = ["assumed (replace with --assume NAME=VALUE, or --mfu)"]
    worked_out = plans[0].time.parts is not None
    if worked_out:
        lines[:0] = ["counted: FLOPs, bytes and kernels of the model, bytes of the optimizer and of all collectives"]
    for field in fields(plans[0].assumptions):
        of_gpus = [getattr(plan.assumptions, field.name) for plan in plans]
        if of_gpus[0] is None or (field.name in SPEEDS and not worked_out):
            continue
        values = ", ".join(dict.fromkeys(_number(assumption.value) for assumption in of_gpus))
        lines.append(f"  {field.name:20} {values} {of_gpus[0].unit} ({of_gpus[0].source})")
    for gpu in (plan.cluster.gpu for plan in plans):
        lines.append(
            f"  {gpu.name:20} {gpu.memory_bytes / GIB:.1f} GiB, {gpu.peak_flops / 1e12:g} TFLOP/s bf16, "
            f"{gpu.link_bytes / 1e9:g} GB/s NVLink of {gpu.link_ranks}, {gpu.network_bytes / 1e9:g} GB/s network, "
            f"{gpu.host_link_bytes / 1e9:g} GB/s PCIe, each in one direction"
        )
    return [*lines, "  (GPUs: NVIDIA's data sheets; links and network as in DGX machines, one adapter a GPU)"]


def _number(value: float) -> str:
    """Return a number as `--assume` takes it: 200e9, not 2e+11."""
    return f"{value / 1e9:g}e9" if value >= 1e9 else f"{value:g}"


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return []
    return [f"{plan.cluster.gpu.name}: does not fit: {needed(plan)}. Any of these would:", *remedy_lines(plan)]


def needed(plan: Plan) -> str:
    """Return the memory that a run needs of a GPU, and its capacity.

    Args:
        plan: Plan of the run.
    """
    return f"{plan.footprint.total / GIB:.1f} GiB of {plan.footprint.capacity / GIB:.1f} GiB"


def remedy_lines(plan: Plan) -> list[str]:
    """Return the remedies of a run that does not fit, one a line.

    Args:
        plan: Plan of the run.
    """
    lines = [f"  {' '.join(remedy.overrides)}  ({remedy.total / GIB:.1f} GiB)" for remedy in plan.remedies]
    return lines or ["  nothing that was tried; use more nodes, larger GPUs or a smaller model"]
