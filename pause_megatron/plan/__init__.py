"""Estimates of memory, communication and time of a run before it is submitted. Arithmetic only, no torch."""

from __future__ import annotations

from pause_megatron.config.gpus import GPUS, gpu_named
from pause_megatron.plan.machine import Assumptions, Cluster
from pause_megatron.plan.measured import measured_values
from pause_megatron.plan.plan import Plan, make_plan
from pause_megatron.plan.record import as_json
from pause_megatron.plan.report import as_table

__all__ = ["GPUS", "Assumptions", "Cluster", "Plan", "as_json", "as_table", "gpu_named", "make_plan", "measured_values"]
