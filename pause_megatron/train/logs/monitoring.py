"""What a run shows on stderr: a summary at its start, a progress bar, a summary at its end. And `RUN/config.yaml`."""

from __future__ import annotations

import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pause_megatron.config.batching import BatchPlan
from pause_megatron.config.load import dump
from pause_megatron.config.lora import trained_parameters
from pause_megatron.config.presets import parameters
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.distributed import ParallelContext
from pause_megatron.files.durable import write_whole
from pause_megatron.terminal.progress import open_bar
from pause_megatron.train.hooks import Monitor
from pause_megatron.train.loop import Metrics, Progress, StepResult

log = logging.getLogger(__name__)


class ConfigFile(Monitor):
    """Hook that writes `RUN/config.yaml` at the start, and again at the end where it is missing then.

    Args:
        path: The file.
        config: Configuration of the run.
    """

    def __init__(self, path: Path, config: ResolvedConfig) -> None:
        self._path, self._text = path, dump(config)
        self._written = False

    def open(self) -> None:
        """Write the file, in place of that of an earlier start."""
        write_whole(self._path, self._text.encode())
        self._written = True

    def close(self) -> None:
        """Write the file where it is missing."""
        if not self._written or not self._path.exists():
            self.open()


def log_start(
    config: ResolvedConfig, plan: BatchPlan, vocabulary: int, zero_stage: int, context: ParallelContext, data: str
) -> None:
    """Log topology, precision, parameters, steps and run folder.

    Args:
        config: Configuration of the run.
        plan: Its batches.
        vocabulary: Rows of the vocabulary, padding excluded.
        zero_stage: ZeRO stage of the engine.
        context: Process groups of this rank.
        data: What a step reads, in a few words.
    """
    sequence = " with sequence parallelism" if config.parallel.sequence else ""
    log.info(
        f"{plan.world_size} {'rank' if plan.world_size == 1 else 'ranks'} on {context.device.type}: "
        f"{plan.data_parallel} data parallel x {plan.tensor} tensor "
        f"parallel{sequence}, ZeRO {zero_stage}, {config.engine.precision}"
    )
    trained = trained_parameters(config)
    only = "" if trained is None else f", {trained:,} train ({config.train.only})"
    log.info(
        f"{parameters(config.model, vocabulary):,} parameters{only}; {plan.steps:,} steps of "
        f"{data}{_extension(config)}, run folder {config.run.dir}"
    )


def _extension(config: ResolvedConfig) -> str:
    extended = config.train.extended_from
    return "" if extended is None else f", after the {extended:,} of the finished run"


def log_end(progress: Progress, stopped: bool, reason: str | None, checkpoint: Path | None) -> None:
    """Log what the run has seen, its realised pause rate, and where it is saved.

    Args:
        progress: Counters of the run.
        stopped: Whether it was stopped before its end.
        reason: Why it was stopped; None: another rank was asked.
        checkpoint: Checkpoint of the last step; None: no step was taken.
    """
    why = f" ({reason})" if stopped and reason else ""
    rate = 1 - progress.text_tokens / progress.tokens if progress.tokens else 0.0
    saved = "; no step was taken, none is saved" if checkpoint is None else f"; saved in {checkpoint}"
    again = ": the same command resumes" if stopped else ""
    log.info(
        f"{'stopped' if stopped else 'complete'} after step {progress.step:,}{why}: {progress.tokens:,} raw tokens, "
        f"{progress.text_tokens:,} of text, realised pause rate {rate:.2%}{saved}{again}"
    )


class ProgressBar(Monitor):
    """A progress bar on stderr; where stderr is not a terminal, a line every half minute.

    Its tokens/s are those of the steps since the previous line: single steps vary widely on a shared machine.

    Args:
        total_steps: Steps of the whole run.
        done: Steps taken before the start.
    """

    _SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, total_steps: int, done: int) -> None:
        self._total, self._before, self._begun = total_steps, done, time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = open_bar(sys.stderr, "", total=total_steps, initial=done, unit="step", dynamic_ncols=True)
        self._last_line = 0.0
        self._tokens, self._seconds = 0, 0.0

    def __call__(self, result: StepResult) -> None:
        """Show a step, and its validation if there was one."""
        self._tokens += result.tokens
        self._seconds += result.seconds
        rate = self._tokens / self._seconds
        summary = (
            f"loss {result.losses.mean:.4f} nats, grad norm {result.grad_norm:.3f}, lr {result.lr:.2e}, "
            f"{rate / 1000:.1f}k tokens/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(summary, refresh=False)
            self._bar.update()
            self._tokens, self._seconds = 0, 0.0
        else:
            self._log_line(result, summary)
        if "valid_loss" in result.metrics:
            log.info(f"step {result.step}: {validation_text(result.metrics)}")

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def _log_line(self, result: StepResult, summary: str) -> None:
        now = time.monotonic()
        if result.last or now - self._last_line >= self._SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._tokens, self._seconds = 0, 0.0
            done = result.step - self._before
            left = tqdm.format_interval((now - self._begun) / done * (self._total - result.step))
            log.info(f"step {result.step}/{self._total}: {summary}, {left} left")


def validation_text(metrics: Metrics) -> str:
    """Return held-out losses as a line: the mean, then its parts where they exist and differ from it.

    Args:
        metrics: Metrics with the names of `validation_losses`; others are left out.
    """
    mean = metrics["valid_loss"]
    parts = [
        f"{name.removeprefix('valid_loss')[1:]} {value:.4f}"
        for name, value in metrics.items()
        if name.startswith("valid_loss") and value is not None and value != mean and name != "valid_loss"
    ]
    return f"valid_loss {mean:.4f} nats" + (f" ({', '.join(parts)})" if parts else "")


def peak_memory_bytes() -> int:
    """Return the peak memory of this rank in bytes: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
