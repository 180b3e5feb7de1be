"""Plans as a table, one column for each kind of GPU, and as JSON. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from pause_megatron.plan.machine import GIB
from pause_megatron.plan.plan import Plan

Row = tuple[str, Callable[[Plan], str]]
_KINDS = ("weights", "gathered parameters", "gradients", "optimizer", "buffers", "activations", "head", "batches")


def as_table(plans: Sequence[Plan]) -> str:
    """Lay out plans of one run on several kinds of GPU side by side, then traffic and assumptions."""
    rows = [(name, [cell(plan) for plan in plans]) for name, cell in _rows(plans)]
    names = max(len(name) for name, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(plans))]
    lines = [
        f"{name:{names}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, cells in rows
    ]
    lines += ["", *_traffic(plans[0]), "", *_assumptions(plans[0])]
    for plan in plans:
        lines += [f"warning: {text}" for text in plan.warnings] if plan is plans[0] else []
        lines += _verdict(plan)
    return "\n".join(lines)


def _rows(plans: Sequence[Plan]) -> list[Row]:
    def gib(value: Callable[[Plan], float]) -> Callable[[Plan], str]:
        return lambda plan: f"{value(plan) / GIB:,.2f} GiB"

    def kind(name: str) -> Callable[[Plan], float]:
        return lambda plan: plan.memory.phases[plan.memory.peak_phase].get(name, 0)

    used = [name for name in _KINDS if any(kind(name)(plan) for plan in plans)]
    return [
        ("GPU", lambda plan: plan.cluster.gpu.name),
        ("ranks", lambda plan: f"{plan.cluster.nodes} x {plan.cluster.gpus_per_node} = {plan.cluster.ranks}"),
        ("data x tensor parallel", lambda plan: f"{plan.layout.data_parallel} x {plan.layout.tensor}"),
        ("ZeRO stage", lambda plan: str(plan.layout.stage)),
        ("global = micro x accumulation x data", _batch),
        ("parameters of a rank", lambda plan: f"{plan.layout.numel:,}"),
        ("memory is largest at", lambda plan: plan.memory.peak_phase),
        *((f"  {name}", gib(kind(name))) for name in used),
        ("  fragmentation margin", gib(lambda plan: plan.footprint.margin)),
        ("  context, libraries, NCCL", gib(lambda plan: plan.footprint.base)),
        ("memory of a GPU", gib(lambda plan: plan.footprint.total)),
        ("of", gib(lambda plan: plan.footprint.capacity)),
        ("fits", lambda plan: "yes" if plan.fits else "NO"),
        ("memory of the host, a node", gib(lambda plan: plan.memory.host_bytes * plan.cluster.gpus_per_node)),
        ("largest batch.micro_size that fits", lambda plan: str(plan.largest_micro_size or "none")),
        ("sent by a rank, a step", gib(lambda plan: sum(w.traffic.wire_bytes for w in plan.wires))),
        ("  of it to other nodes", gib(lambda plan: sum(w.inter_node_bytes for w in plan.wires))),
        ("FLOPs a step", lambda plan: f"{plan.time.model_flops / 1e15:,.1f} PFLOP"),
        ("step", lambda plan: f"{plan.time.seconds:,.3f} s"),
        ("  computing", lambda plan: f"{plan.time.compute_seconds:,.3f} s"),
        ("  communication not hidden", lambda plan: f"{plan.time.exposed_seconds:,.3f} s"),
        ("  offload", lambda plan: f"{plan.time.offload_seconds:,.3f} s"),
        ("MFU of the step", lambda plan: f"{plan.mfu:.1%}"),
        ("raw tokens/s", lambda plan: f"{plan.layout.batch.raw_tokens / plan.time.seconds:,.0f}"),
        ("text tokens/s", lambda plan: f"{plan.layout.batch.text_tokens / plan.time.seconds:,.0f}"),
        ("days for the budget", lambda plan: _days(plan.run_seconds)),
        ("GPU-hours", lambda plan: _gpu_hours(plan)),
        ("checkpoint", gib(lambda plan: plan.saving.bytes)),
        ("  one save", lambda plan: f"{plan.saving.seconds:,.1f} s"),
        ("  best checkpoint.every", lambda plan: f"{plan.saving.every:,} steps"),
        ("  which is every", lambda plan: f"{plan.saving.interval_seconds / 60:,.0f} min"),
        ("  time lost", lambda plan: f"{plan.saving.lost:.2%}"),
        ("  time lost as configured", lambda plan: f"{plan.saving.lost_as_configured:.2%}"),
    ]


def _batch(plan: Plan) -> str:
    batch = plan.layout.batch
    return f"{batch.global_size} = {batch.micro_size} x {batch.accumulation} x {batch.data_parallel}"


def _days(seconds: float | None) -> str:
    return "no budget given" if seconds is None else f"{seconds / 86400:,.2f}"


def _gpu_hours(plan: Plan) -> str:
    return "-" if plan.run_seconds is None else f"{plan.run_seconds / 3600 * plan.cluster.ranks:,.0f}"


def _traffic(plan: Plan) -> list[str]:
    lines = [f"traffic of a step ({plan.cluster.gpu.name}; bytes of the whole tensors, seconds and what is exposed)"]
    for wire in plan.wires:
        traffic = wire.traffic
        where = "between nodes" if wire.crosses_nodes else "inside a node"
        lines.append(
            f"  {traffic.purpose:20} {traffic.operation:14} over {traffic.ranks:>5} {traffic.group:6} ranks, {where}: "
            f"{traffic.bytes / GIB:8.3f} GiB  {wire.seconds:7.4f} s  {wire.exposed_seconds:7.4f} s"
        )
    return lines if plan.wires else ["no traffic: one rank"]


def _assumptions(plan: Plan) -> list[str]:
    gpu = plan.cluster.gpu
    lines = ["assumed (replace with --assume NAME=VALUE, or --mfu)"]
    for field in fields(plan.assumptions):
        assumption = getattr(plan.assumptions, field.name)
        lines.append(f"  {field.name:18} {assumption.value:g} {assumption.unit} ({assumption.source})")
    lines.append(
        f"  {gpu.name}: {gpu.memory_bytes / GIB:.1f} GiB, {gpu.peak_flops / 1e12:g} TFLOP/s bf16, "
        f"{gpu.link_bytes / 1e9:g} GB/s NVLink, {gpu.network_bytes / 1e9:g} GB/s network, "
        f"{gpu.host_link_bytes / 1e9:g} GB/s PCIe, each in one direction (NVIDIA's data sheets; DGX machines)"
    )
    return lines


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        return []
    lines = [
        f"{plan.cluster.gpu.name}: does not fit: {plan.footprint.total / GIB:.1f} GiB of "
        f"{plan.footprint.capacity / GIB:.1f} GiB. What would:"
    ]
    lines += [f"  {' '.join(remedy.overrides)}  ({remedy.total / GIB:.1f} GiB)" for remedy in plan.remedies]
    return lines if plan.remedies else [*lines, "  nothing that was tried; use more nodes or a smaller model"]


def as_json(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Everything of the table and more, in bytes, seconds and FLOPs."""
    return [_record(plan) for plan in plans]


def _record(plan: Plan) -> dict[str, Any]:
    layout, batch, time = plan.layout, plan.layout.batch, plan.time
    return {
        "gpu": asdict(plan.cluster.gpu),
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.gpus_per_node,
        "ranks": plan.cluster.ranks,
        "data_parallel": layout.data_parallel,
        "tensor_parallel": layout.tensor,
        "zero_stage": layout.stage,
        "global_size": batch.global_size,
        "micro_size": batch.micro_size,
        "accumulation": batch.accumulation,
        "rank_parameters": layout.numel,
        "memory": {
            "peak_phase": plan.memory.peak_phase,
            "phases_bytes": plan.memory.phases,
            "tensors_bytes": plan.footprint.tensors,
            "fragmentation_bytes": plan.footprint.margin,
            "base_bytes": plan.footprint.base,
            "total_bytes": plan.footprint.total,
            "capacity_bytes": plan.footprint.capacity,
            "host_bytes_a_rank": plan.memory.host_bytes,
        },
        "fits": plan.fits,
        "largest_micro_size": plan.largest_micro_size,
        "remedies": [{"overrides": list(r.overrides), "total_bytes": r.total} for r in plan.remedies],
        "traffic": [
            {
                **asdict(wire.traffic),
                "wire_bytes": wire.traffic.wire_bytes,
                "inter_node_bytes": wire.inter_node_bytes,
                "seconds": wire.seconds,
                "exposed_seconds": wire.exposed_seconds,
            }
            for wire in plan.wires
        ],
        "step": {
            "model_flops": time.model_flops,
            "executed_flops": time.executed_flops,
            "seconds": time.seconds,
            "compute_seconds": time.compute_seconds,
            "exposed_seconds": time.exposed_seconds,
            "offload_seconds": time.offload_seconds,
            "mfu": plan.mfu,
            "raw_tokens": batch.raw_tokens,
            "text_tokens": batch.text_tokens,
            "raw_tokens_per_second": batch.raw_tokens / time.seconds,
            "text_tokens_per_second": batch.text_tokens / time.seconds,
        },
        "steps": batch.steps,
        "run_seconds": plan.run_seconds,
        "gpu_hours": None if plan.run_seconds is None else plan.run_seconds / 3600 * plan.cluster.ranks,
        "checkpoint": asdict(plan.saving),
        "warnings": list(plan.warnings),
        "assumptions": {
            field.name: asdict(getattr(plan.assumptions, field.name)) for field in fields(plan.assumptions)
        },
    }
