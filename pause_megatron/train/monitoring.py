"""What a run says while it goes on: metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import io
import json
import math
import resource
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pause_megatron.config.gpus import device_peak_flops
from pause_megatron.config.plan import BatchPlan
from pause_megatron.config.presets import parameters, step_flops
from pause_megatron.config.schema import RunConfig
from pause_megatron.data.batch import MicroBatch
from pause_megatron.distributed import ParallelContext
from pause_megatron.metrics_lines import keep_steps
from pause_megatron.train.loop import Progress, StepResult


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
    def of(cls, config: RunConfig, vocabulary: int, context: ParallelContext) -> Throughput:
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
    """`RUN/metrics.jsonl`: one JSON object a step, whole lines only."""

    def __init__(self, path: Path, throughput: Throughput, resume_after: int) -> None:
        self._throughput = throughput
        if damage := keep_steps(path, resume_after):
            _say(damage)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def __call__(self, result: StepResult) -> None:
        self._file.write(json.dumps(metrics_record(result, self._throughput)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


TAGS = {
    "loss": "loss/train",
    "loss_after_pause": "loss/train_after_pause",
    "loss_elsewhere": "loss/train_elsewhere",
    "valid_loss": "loss/valid",
    "valid_loss_after_pause": "loss/valid_after_pause",
    "valid_loss_elsewhere": "loss/valid_elsewhere",
    "valid_loss_without_pauses": "loss/valid_without_pauses",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/learning_rate",
    "pause_fraction": "data/pause_fraction",
    "tokens": "data/raw_tokens",
    "text_tokens": "data/text_tokens",
    "tokens_per_second": "throughput/raw_tokens_per_second",
    "text_tokens_per_second": "throughput/text_tokens_per_second",
    "mfu": "throughput/mfu",
    "seconds": "time/step_seconds",
    "loader_seconds": "time/loader_seconds",
    "hook_seconds": "time/hook_seconds",
}


class TensorBoard:
    """`RUN/tensorboard/`: scalars, the configuration as text, and windows with their pauses shown."""

    def __init__(
        self,
        folder: Path,
        throughput: Throughput,
        *,
        resume_after: int,
        config_yaml: str,
        show: Callable[[MicroBatch], str],
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._throughput, self._show = throughput, show
        # Points of steps that will be taken again are hidden.
        self._writer = SummaryWriter(str(folder), purge_step=resume_after + 1)
        self._writer.add_text("configuration", _preformatted(config_yaml), resume_after)

    def __call__(self, result: StepResult) -> None:
        record = metrics_record(result, self._throughput)
        for key, tag in TAGS.items():
            if (value := record.get(key)) is not None:
                self._writer.add_scalar(tag, value, result.step)
        for key, value in record.items():  # of the corpora of a blend
            for prefix, tag in (("loss/", "loss_by_corpus/train_"), ("valid_loss/", "loss_by_corpus/valid_")):
                if key.startswith(prefix) and value is not None:
                    self._writer.add_scalar(tag + key.removeprefix(prefix), value, result.step)
        for key, tag in (("loss", "perplexity/train"), ("valid_loss", "perplexity/valid")):
            if (loss := record.get(key)) is not None:
                self._writer.add_scalar(tag, math.exp(min(loss, 700.0)), result.step)
        self._writer.add_scalar("memory/peak_gib", peak_memory_bytes() / 2**30, result.step)

    def show_sample(self, result: StepResult) -> None:
        """The first window of the step as text."""
        lines = self._show(result.sample).splitlines()
        text = "\n".join(textwrap.fill(line, 120) for line in lines)
        self._writer.add_text("sample", _preformatted(text), result.step)

    def close(self) -> None:
        self._writer.close()


def announce(
    config: RunConfig, plan: BatchPlan, vocabulary: int, zero_stage: int, context: ParallelContext, data: str
) -> None:
    """Says on stderr what is about to run; `data` says what a step reads."""
    sequence = " with sequence parallelism" if config.parallel.sequence else ""
    _say(
        f"{plan.world_size} ranks on {context.device.type}: {plan.data_parallel} data parallel x {plan.tensor} tensor "
        f"parallel{sequence}, ZeRO {zero_stage}, {config.engine.precision}"
    )
    _say(
        f"{parameters(config.model, vocabulary):,} parameters; {plan.steps:,} steps{_behind(config)} of {data}, "
        f"run folder {config.run.dir}"
    )


def _behind(config: RunConfig) -> str:
    extended = config.train.extended_from
    return "" if extended is None else f" after step {extended:,}, which the run is extended from,"


def conclude(progress: Progress, stopped: bool, reason: str | None) -> None:
    """Says on stderr what the run has seen, the realised pause rate above all.

    Args:
        stopped: before its end. reason: why, if this rank knows.
    """
    why = f" ({reason})" if stopped and reason else ""
    rate = 1 - progress.text_tokens / progress.tokens if progress.tokens else 0.0
    _say(
        f"{'stopped' if stopped else 'complete'} after step {progress.step:,}{why}: {progress.tokens:,} raw tokens, "
        f"{progress.text_tokens:,} of text, realised pause rate {rate:.2%}"
    )


class ProgressBar:
    """One line on stderr that moves; where stderr is not a terminal, a line every half minute."""

    _SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, total_steps: int, done: int) -> None:
        self._terminal = sys.stderr.isatty()
        # Off a terminal tqdm only keeps the time: it would draw one endless line.
        sink = sys.stderr if self._terminal else io.StringIO()
        self._bar = tqdm(total=total_steps, initial=done, unit="step", dynamic_ncols=True, file=sink)
        self._last_line = 0.0

    def __call__(self, result: StepResult) -> None:
        rate = result.tokens / result.seconds
        summary = (
            f"loss {result.losses.mean:.4f} nats, grad norm {result.grad_norm:.3f}, lr {result.lr:.2e}, "
            f"{rate / 1000:.1f}k tokens/s"
        )
        self._bar.set_postfix_str(summary, refresh=False)
        self._bar.update()
        if not self._terminal:
            self._line(result, summary)
        if result.validation:
            self._say(f"step {result.step}: {validation_text(result.validation)}")

    def stop(self, result: StepResult) -> None:
        pass

    def close(self) -> None:
        self._bar.close()

    def _line(self, result: StepResult, summary: str) -> None:
        now = time.monotonic()
        if result.last or now - self._last_line >= self._SECONDS_BETWEEN_LINES:
            self._last_line = now
            progress = self._bar.format_dict
            done, elapsed = progress["n"] - progress["initial"], progress["elapsed"]
            left = tqdm.format_interval(elapsed / done * (progress["total"] - progress["n"]))
            self._say(f"step {result.step}/{progress['total']}: {summary}, {left} left")

    def _say(self, text: str) -> None:
        if self._terminal:
            self._bar.write(text, file=sys.stderr)
        else:
            _say(text)


def validation_text(losses: Mapping[str, float | None]) -> str:
    """Held-out losses in a line: the mean, then its parts where they exist and say something else.

    Args:
        losses: as `validation_losses` names them
    """
    mean = losses["valid_loss"]
    parts = [
        f"{name.removeprefix('valid_loss')[1:]} {value:.4f}"
        for name, value in losses.items()
        if value is not None and value != mean and name != "valid_loss"
    ]
    return f"valid_loss {mean:.4f} nats" + (f" ({', '.join(parts)})" if parts else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def peak_memory_bytes() -> int:
    """Most memory this rank has held: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _preformatted(text: str) -> str:
    """Markdown that TensorBoard shows as it stands."""
    return "\n".join("    " + line for line in text.splitlines())
