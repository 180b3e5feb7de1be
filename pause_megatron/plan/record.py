"""Plans as JSON records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from pause_megatron.plan.plan import Plan


def as_json(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Return plans as records for `json.dumps`, in bytes, seconds and FLOPs.

    Args:
        plans: Plans of one run, one for each kind of GPU.
    """
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
        "memory_micro_size": plan.memory_micro_size,
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
            "computing_mfu": plan.computing_mfu,
            "compute_parts_seconds": None if time.parts is None else asdict(time.parts),
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
            field.name: {key: value for key, value in asdict(assumption).items() if value is not None}
            for field in fields(plan.assumptions)
            if (assumption := getattr(plan.assumptions, field.name)) is not None
        },
    }
