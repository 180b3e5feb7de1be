"""Tasks, their examples and their metrics. No torch and no model."""

from __future__ import annotations

from pause_megatron.tasks.examples import fingerprint, read_examples
from pause_megatron.tasks.load import load_task, task_names
from pause_megatron.tasks.metrics.registry import METRICS, Metric, answer_in, register_metric
from pause_megatron.tasks.task import Decoding, Example, FinetuneDefaults, Task
from pause_megatron.tasks.yaml_task import DeclaredTask

__all__ = [
    "METRICS",
    "DeclaredTask",
    "Decoding",
    "Example",
    "FinetuneDefaults",
    "Metric",
    "Task",
    "answer_in",
    "fingerprint",
    "load_task",
    "read_examples",
    "register_metric",
    "task_names",
]
