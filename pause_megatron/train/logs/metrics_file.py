"""`RUN/metrics.jsonl`: one line of metrics per step, with throughput and MFU."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import torch

from pause_megatron.config.gpus import device_peak_flops
from pause_megatron.config.presets import step_flops
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.files.metrics_lines import keep_steps
from pause_megatron.train.hooks import Monitor
from pause_megatron.train.logs.appending import AppendedFile
from pause_megatron.train.loop import StepResult

log = logging.getLogger(__name__)


class Throughput:
    """Throughput of a step: tokens per second and MFU.

    MFU = model FLOPs of the step / (seconds of the step x peak of all devices). The FLOPs are those of the rows that
    are computed, forward and backward (`config.presets.step_flops`):

        (6 x parameters of layers and norms + 12 x layers x hidden x window) x raw tokens
        + 6 x vocabulary x hidden x targets

    Hints are targets here, and so is each row that an objective reads. Recomputed activations do not count, nor do the
    matrices of auxiliary heads, nor the output layer on rows without a target. The seconds include waiting for the
    loader, but not hooks: those are `hook_seconds`.

    Args:
        flops: (raw tokens, targets) -> model FLOPs of a step over all ranks.
        peak_flops: Peak of all devices together, in FLOP/s; None: unknown.
    """

    def __init__(self, flops: Callable[[int, int], float], peak_flops: float | None) -> None:
        self._flops, self._peak_flops = flops, peak_flops

    @classmethod
    def of(cls, config: ResolvedConfig, vocabulary: int, context: ParallelContext) -> Throughput:
        """Return the throughput of a run, with `log.peak_tflops`, else the GPU's known bf16 peak, else no MFU.

        Args:
            config: Configuration of the run.
            vocabulary: Rows of the vocabulary, padding excluded.
            context: Process groups of this rank.
        """
        cuda_name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else None
        peak = device_peak_flops(config, cuda_name)

        def flops(tokens: int, targets: int) -> int:
            length = config.data.sequence_length
            return step_flops(config.model, vocabulary, length, tokens=tokens, targets=targets)

        return cls(flops, None if peak is None else peak * context.world_size)

    def rates(self, result: StepResult) -> dict[str, float | None]:
        """Return raw and text tokens per second over all ranks, and MFU (None without a known peak).

        Args:
            result: Result of the step.
        """
        flops = self._flops(result.tokens, result.losses.head_rows)
        return {
            "tokens_per_second": result.tokens / result.seconds,
            "text_tokens_per_second": result.text_tokens / result.seconds,
            "mfu": None if self._peak_flops is None else flops / result.seconds / self._peak_flops,
        }


def metrics_record(result: StepResult, throughput: Throughput) -> dict[str, float | int | bool | None]:
    """Return a line of metrics.jsonl. Floats are not rounded; a value that does not exist (no pauses, no peak) is null.

    `seconds` is the step, including `loader_seconds`; `hook_seconds` is logging, validation and saves since the
    previous step, or the start. Over all steps they add up to the time until the last step ended, whose hooks are in no
    line.

    Args:
        result: Result of the step.
        throughput: Throughput of the run.
    """
    record: dict[str, float | int | bool | None] = {
        "step": result.step,
        "loss": result.losses.mean,
        "loss_after_pause": result.losses.after_pause,
        "loss_elsewhere": result.losses.elsewhere,
        **{f"loss/{name}": loss for name, loss in result.losses.by_corpus.items()},
        **({} if result.losses.hints is None else {"loss_hints": result.losses.hints}),
        **result.losses.of_objective(),
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens": result.progress.tokens,
        "text_tokens": result.progress.text_tokens,
        "targets": result.losses.targets,
        **({} if result.losses.hints is None else {"hint_targets": result.losses.hint_targets}),
        "pause_fraction": 1.0 - result.text_tokens / result.tokens,
        "applied": result.applied,
        **result.metrics,
        **throughput.rates(result),
        "seconds": result.seconds,
        "loader_seconds": result.loader_seconds,
        "hook_seconds": result.hook_seconds,
    }
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


class MetricsFile(Monitor):
    """Log file with one JSON object per step.

    Args:
        path: The file; created where it does not exist, also when it was deleted during the run.
        throughput: Throughput of the run.
        resume_after: Last step before the start; lines of later steps are removed when the file is opened.
    """

    def __init__(self, path: Path, throughput: Throughput, resume_after: int) -> None:
        self._throughput, self._resume_after = throughput, resume_after
        self._file = AppendedFile(path)
        self._resumed = False

    def open(self) -> None:
        """Remove the lines of steps that will be taken again, once, and open the file to append."""
        if not self._resumed:
            self._resumed = True
            # Not of a pipe or a device: reading one may never end.
            damage = keep_steps(self._file.path, self._resume_after) if self._file.path.is_file() else None
            if damage:
                log.warning(damage)
        self._file.open()

    def __call__(self, result: StepResult) -> None:
        """Append the line of a step."""
        self.open()
        self._file.append(json.dumps(metrics_record(result, self._throughput)).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
