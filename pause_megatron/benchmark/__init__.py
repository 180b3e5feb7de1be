"""What a machine does with a configuration: real training steps on made-up or real windows, timed and taken apart."""

from __future__ import annotations

from pause_megatron.benchmark.measure import Sizes, run_benchmark
from pause_megatron.benchmark.record import Measurement, as_record
from pause_megatron.benchmark.report import as_table

__all__ = ["Measurement", "Sizes", "as_record", "as_table", "run_benchmark"]
