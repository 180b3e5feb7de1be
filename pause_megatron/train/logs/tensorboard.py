"""`RUN/tensorboard/`: scalars, the configuration as text, and windows with their pauses as text.

Events are made by torch and framed by TensorBoard's own writer. They are appended here, in their step: torch's
`SummaryWriter` leaves that to a thread, which ends with a traceback at the first write that fails.
"""

from __future__ import annotations

import io
import math
import os
import socket
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pause_megatron.data.batches.batch import MicroBatch
from pause_megatron.train.hooks import Monitor
from pause_megatron.train.logs.appending import AppendedFile
from pause_megatron.train.logs.metrics_file import Throughput, metrics_record
from pause_megatron.train.logs.monitoring import peak_memory_bytes
from pause_megatron.train.loop import StepResult

TAGS = {
    "loss": "loss/train",
    "loss_after_pause": "loss/train_after_pause",
    "loss_elsewhere": "loss/train_elsewhere",
    "loss_hints": "loss/train_hints",
    "valid_loss": "loss/valid",
    "valid_loss_after_pause": "loss/valid_after_pause",
    "valid_loss_elsewhere": "loss/valid_elsewhere",
    "valid_loss_hints": "loss/valid_hints",
    "valid_loss_without_pauses": "loss/valid_without_pauses",
    "objective": "objective/train",
    "valid_objective": "objective/valid",
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

TAGS_OF_NAMES = {
    "loss/": "loss_by_corpus/train_",
    "valid_loss/": "loss_by_corpus/valid_",
    "objective/": "objective/train_",
    "valid_objective/": "objective/valid_",
}


class TensorBoard(Monitor):
    """Writer of an event file of this run.

    Args:
        folder: Folder of the event files.
        throughput: Throughput of the run.
        resume_after: Last step before the start; TensorBoard hides points of later steps in older files.
        config_yaml: Configuration of the run, shown as text.
        show: Returns the first window of a micro-batch as text.
    """

    def __init__(
        self,
        folder: Path,
        throughput: Throughput,
        *,
        resume_after: int,
        config_yaml: str,
        show: Callable[[MicroBatch], str],
    ) -> None:
        from tensorboard.compat.proto import event_pb2
        from torch.utils.tensorboard import summary

        self._summary, self._event = summary, event_pb2.Event
        self._throughput, self._show = throughput, show
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        head = [
            self._event(wall_time=time.time(), file_version="brain.Event:2"),
            self._event(wall_time=time.time(), step=resume_after + 1, session_log=start),
            self._text("configuration", config_yaml, resume_after),
        ]
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = AppendedFile(folder / name, _framed(head))

    def open(self) -> None:
        """Create the folder and the file."""
        self._file.open()

    def __call__(self, result: StepResult) -> None:
        """Append the scalars of a step."""
        record = metrics_record(result, self._throughput)
        values = {tag: record[key] for key, tag in TAGS.items() if record.get(key) is not None}
        for key, value in record.items():  # of the corpora of a blend, and of an objective
            for prefix, tag in TAGS_OF_NAMES.items():
                if key.startswith(prefix) and value is not None:
                    values[tag + key.removeprefix(prefix)] = value
        for key, tag in (("loss", "perplexity/train"), ("valid_loss", "perplexity/valid")):
            if (loss := record.get(key)) is not None:
                values[tag] = math.exp(min(loss, 700.0))
        values["memory/peak_gib"] = peak_memory_bytes() / 2**30
        event = self._event(wall_time=time.time(), step=result.step)
        for tag, value in values.items():
            event.summary.MergeFrom(self._summary.scalar(tag, value))
        self._file.append(_framed([event]))

    def show_sample(self, result: StepResult) -> None:
        """Append the first window of a step as text."""
        lines = self._show(result.sample).splitlines()
        text = "\n".join(textwrap.fill(line, 120) for line in lines)
        self._file.append(_framed([self._text("sample", text, result.step)]))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _text(self, tag: str, text: str, step: int) -> Any:
        """Return an event whose text TensorBoard shows verbatim: Markdown renders indented lines so."""
        indented = "\n".join("    " + line for line in text.splitlines())
        return self._event(wall_time=time.time(), step=step, summary=self._summary.text(tag, indented))


def _framed(events: list[Any]) -> bytes:
    """Return events as an event file holds them."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    framed = io.BytesIO()
    for event in events:
        RecordWriter(framed).write(event.SerializeToString())
    return framed.getvalue()
