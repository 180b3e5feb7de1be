"""Benchmark of a configuration on this machine: training steps on real or synthetic windows, timed and profiled."""

from __future__ import annotations

from pause_megatron.benchmark.measure import Sizes, run_benchmark
from pause_megatron.benchmark.record import Measurement, as_record
from pause_megatron.benchmark.report import as_table

__all__ = ["Measurement", "Sizes", "as_record", "as_table", "run_benchmark"]
