"""Tasks, their examples and their metrics. No torch and no model."""

from __future__ import annotations

from pause_megatron.tasks.examples import Part, fingerprint, read_examples
from pause_megatron.tasks.few_shot import FewShot, with_shots
from pause_megatron.tasks.load import load_task, task_names
from pause_megatron.tasks.metrics.registry import METRICS, Metric, answer_in, metrics_of, register_metric
from pause_megatron.tasks.sampling import divide, sample
from pause_megatron.tasks.task import Decoding, Example, FinetuneDefaults, Task
from pause_megatron.tasks.yaml_task import DeclaredTask

__all__ = [
    "METRICS",
    "DeclaredTask",
    "Decoding",
    "Example",
    "FewShot",
    "FinetuneDefaults",
    "Metric",
    "Part",
    "Task",
    "answer_in",
    "divide",
    "fingerprint",
    "load_task",
    "metrics_of",
    "read_examples",
    "register_metric",
    "sample",
    "task_names",
    "with_shots",
]
