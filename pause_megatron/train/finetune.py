"""Pause-finetuning (Goyal et al., ICLR 2024, section 3.2): a run on a task's examples, with loss on their targets."""

from __future__ import annotations

import logging

import numpy as np
import xxhash

from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.batches.batch import MicroBatch
from pause_megatron.data.supervised.examples import continuations
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.distributed import initialize
from pause_megatron.distributed.agreement import failing_together
from pause_megatron.distributed.context import started_ranks
from pause_megatron.distributed.settings import settings_of
from pause_megatron.terminal.output import tolerant_output
from pause_megatron.train.guards.same_run import run_record
from pause_megatron.train.guards.signals import StopRequest, listening
from pause_megatron.train.guards.watch import patience
from pause_megatron.train.inputs.inputs import HeldOut, TrainingData
from pause_megatron.train.inputs.task_data import TaskData, held_out, open_task
from pause_megatron.train.run import train

log = logging.getLogger(__name__)


def finetune(config: ResolvedConfig, stop: StopRequest | None = None) -> int:
    """Trains on the examples of `task.name`; otherwise as `pretrain`: the same loop, checkpoints, resume and hooks.

    Args:
        config: a resolved configuration with a task
        stop: one that listens already; default: a new one

    Returns:
        EXIT_FINISHED, or EXIT_STOPPED after one of `signals.STOP_SIGNALS`, SIGINT, or when the job's time is
        nearly over.

    Raises:
        PauseMegatronError: as `pretrain`, and a task, record or example that cannot be used.
    """
    with (
        tolerant_output(),
        listening(stop) as stop,
        settings_of(config),
        failing_together("finetune", config.run.connect_seconds),
    ):
        # Before ranks meet: one that lacks the records says so there.
        task = open_task(config)
        data = training_data(task)
        same = run_record("finetune", task.config, started_ranks()) | task_record(task, data)
        seconds = config.run.connect_seconds
        with initialize(config.parallel, timeout=patience(config), connect_seconds=seconds, same=same) as context:
            if context.rank == 0 and (line := shorter_warmup(config, task.config)):
                log.info(line)
            return train(task.config, data, context, stop)


def task_record(task: TaskData, data: TrainingData) -> dict[str, str]:
    """What is in the examples of a run and in its tokenizer, wherever they lie."""
    valid = xxhash.xxh3_128()
    for example in data.valid.windows.examples if data.valid else ():
        valid.update(np.concatenate([[len(example.prompt)], example.prompt, example.target]).tobytes())
    return {
        "content of task.path": task.fingerprint,
        "content of task.path for validation": valid.hexdigest(),
        "content of data.tokenizer": task.tokenizer.fingerprint,
    }


def shorter_warmup(asked: ResolvedConfig, config: ResolvedConfig) -> str | None:
    """A line about a warm-up that the epochs leave no room for; None where they do."""
    before, now = asked.optim.warmup_steps, config.optim.warmup_steps
    if before == now:
        return None
    epochs, steps = config.finetune.epochs, config.train.steps
    return f"optim.warmup_steps={now}, not {before}: finetune.epochs={epochs:g} of these examples are {steps:,} steps"


def training_data(data: TaskData) -> TrainingData:
    """A task's windows as the loop sees them."""
    valid = plain = None
    if data.config.validation.every:
        valid, plain = (HeldOut(windows, windows.windows_in_epochs(1)) for windows in held_out(data))
    return TrainingData(
        train=data.windows,
        valid=valid,
        valid_without_pauses=plain,
        tokenizer=data.tokenizer,
        pause_ids=data.pause_ids,
        fingerprint=data.fingerprint,
        description=data.description,
        show=lambda batch: show_window(batch, data.tokenizer),
    )


def show_window(batch: MicroBatch, tokenizer: Tokenizer) -> str:
    """The examples of a micro-batch's first window, a line for each: prefix with its pauses, then [[target]]."""
    size = batch.tokens.shape[0]
    mine = batch.target_rows % size == 0
    places, targets = batch.target_rows[mine] // size, batch.targets[mine]
    segments = batch.segments[0] if batch.segments is not None else batch.tokens.new_zeros(batch.tokens.shape[1])
    decode = continuations(tokenizer).decode
    lines = []
    for segment in segments[places].unique().tolist():
        learned = segments[places] == segment
        first = int(segments.eq(segment).nonzero()[0])
        prefix = batch.tokens[0, first : int(places[learned][0]) + 1]
        lines.append(f"{tokenizer.decode(prefix.tolist())}[[{decode(targets[learned].tolist())}]]")
    return "\n".join(lines)
