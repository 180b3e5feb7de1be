"""`RUN/metrics.jsonl`: what each step did, as numbers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pause_megatron.config.gpus import device_peak_flops
from pause_megatron.config.presets import step_flops
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.files.metrics_lines import keep_steps
from pause_megatron.train.logs.appending import AppendedFile
from pause_megatron.train.loop import StepResult

log = logging.getLogger(__name__)


class Throughput:
    """Rates of a step, in the units of metrics.jsonl.

    MFU = model FLOPs of the step / (seconds of the step x peak of all devices). The FLOPs are those of the rows that
    are really computed, forward and backward (`config.presets.step_flops`):

        (6 x parameters of layers and norms + 12 x layers x hidden x window) x raw tokens
        + 6 x vocabulary x hidden x targets

    Recomputed activations do not count, nor the output layer on rows without a target. The seconds count waiting for
    the loader, but not hooks: those are `hook_seconds`.

    Args:
        flops: (raw tokens, targets) -> model FLOPs of a step over all ranks
        peak_flops: of all devices together, in FLOP/s; None when it is not known
    """

    def __init__(self, flops: Callable[[int, int], float], peak_flops: float | None) -> None:
        self._flops, self._peak_flops = flops, peak_flops

    @classmethod
    def of(cls, config: ResolvedConfig, vocabulary: int, context: ParallelContext) -> Throughput:
        """For a run: `log.peak_tflops`, else the GPU's known peak in bf16, else no MFU."""
        cuda_name = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else None
        peak = device_peak_flops(config, cuda_name)

        def flops(tokens: int, targets: int) -> int:
            length = config.data.sequence_length
            return step_flops(config.model, vocabulary, length, tokens=tokens, targets=targets)

        return cls(flops, None if peak is None else peak * context.world_size)

    def rates(self, result: StepResult) -> dict[str, float | None]:
        """Tokens per second over all ranks, raw and text; MFU (model FLOPs over peak), None without a known peak."""
        flops = self._flops(result.tokens, result.losses.targets)
        return {
            "tokens_per_second": result.tokens / result.seconds,
            "text_tokens_per_second": result.text_tokens / result.seconds,
            "mfu": None if self._peak_flops is None else flops / result.seconds / self._peak_flops,
        }


def metrics_record(result: StepResult, throughput: Throughput) -> dict[str, float | int | bool | None]:
    """A line of metrics.jsonl. Floats are not rounded; what does not exist (no pauses, no peak) is null.

    `seconds` (the step, with `loader_seconds` in it) and `hook_seconds` (logging, validation and saves since the step
    before, or the start) of all steps add up to the time until the last step ended; its own hooks are in no line.
    """
    record: dict[str, Any] = {
        "step": result.step,
        "loss": result.losses.mean,
        "loss_after_pause": result.losses.after_pause,
        "loss_elsewhere": result.losses.elsewhere,
        **{f"loss/{name}": loss for name, loss in result.losses.by_corpus.items()},
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens": result.progress.tokens,
        "text_tokens": result.progress.text_tokens,
        "targets": result.losses.targets,
        "pause_fraction": 1.0 - result.text_tokens / result.tokens,
        "applied": result.applied,
        **result.validation,
        **throughput.rates(result),
        "seconds": result.seconds,
        "loader_seconds": result.loader_seconds,
        "hook_seconds": result.hook_seconds,
    }
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


class MetricsFile:
    """One JSON object a step, whole lines only.

    Args:
        path: the file; made when it is not there, also when it was deleted during the run
        throughput: rates of a step
        resume_after: the last step that was taken before; lines of later ones go when the file is opened
    """

    def __init__(self, path: Path, throughput: Throughput, resume_after: int) -> None:
        self._throughput, self._resume_after = throughput, resume_after
        self._file = AppendedFile(path)
        self._begun = False

    def open(self) -> None:
        """Drop the lines of steps that will be taken again, once, and open the file to append."""
        if not self._begun:
            self._begun = True
            # Not of a pipe or a device, which would be read for ever.
            damage = keep_steps(self._file.path, self._resume_after) if self._file.path.is_file() else None
            if damage:
                log.warning(damage)
        self._file.open()

    def __call__(self, result: StepResult) -> None:
        self.open()
        self._file.append(json.dumps(metrics_record(result, self._throughput)).encode() + b"\n")

    def close(self) -> None:
        self._file.close()
