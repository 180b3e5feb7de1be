"""Pause-finetuning (Goyal et al., ICLR 2024, section 3.2): train on a task's examples, with loss on their targets."""

from __future__ import annotations

import logging

import numpy as np
import xxhash

from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.data.batches.batch import MicroBatch
from pause_megatron.data.supervised.windows import SupervisedWindows
from pause_megatron.data.tokenizer.continuation import Continuations
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.distributed import initialize
from pause_megatron.distributed.agreement import failing_together
from pause_megatron.distributed.context import started_ranks
from pause_megatron.distributed.settings import settings_of
from pause_megatron.errors import ConfigError
from pause_megatron.files.digest import bytes_digest
from pause_megatron.objective import loss_plan
from pause_megatron.terminal.output import tolerant_output
from pause_megatron.train.guards.same_run import run_record
from pause_megatron.train.guards.signals import StopRequest, stop_signals
from pause_megatron.train.guards.watch import collective_timeout
from pause_megatron.train.inputs.inputs import HeldOut, TrainingData
from pause_megatron.train.inputs.task_data import TaskData, held_out, open_task
from pause_megatron.train.run import finish, open_run
from pause_megatron.train.training import train

log = logging.getLogger(__name__)

_READS_EVALUATION = (
    "task.held_out=null, as for runs that began before the key existed: validation reads the evaluation split, so do "
    "not choose settings by its curves; a new run with task.held_out=0.05 validates on a part of the train split"
)


def finetune(config: ResolvedConfig, stop: StopRequest | None = None) -> int:
    """Train on the examples of `task.name`; checkpoints, resume, hooks and exit codes are those of `pretrain`.

    Args:
        config: A resolved configuration with a task.
        stop: A stop request whose signal handlers are installed; None: they are installed here.

    Returns:
        EXIT_FINISHED, or EXIT_STOPPED after one of `signals.STOP_SIGNALS`, SIGINT, or when the job's time is
        nearly over.

    Raises:
        PauseMegatronError: As `pretrain`; or a task, record or example cannot be used.
    """
    connect_seconds = config.run.connect_seconds
    with (
        tolerant_output(),
        stop_signals(stop) as stop,
        settings_of(config),
        failing_together("finetune", connect_seconds),
    ):
        task = open_task(config)  # a missing record fails before the rendezvous
        data = training_data(task)
        same = run_record("finetune", task.config, started_ranks()) | task_record(task, data)
        check_steps_are_pauses(task.config)
        timeout = collective_timeout(config)
        with initialize(config.parallel, timeout=timeout, connect_seconds=connect_seconds, same=same) as context:
            if context.rank == 0 and (line := shorter_warmup(config, task.config)):
                log.info(line)
            if context.rank == 0 and task.config.task.held_out is None:
                log.warning(_READS_EVALUATION)
            with open_run(task.config, data, context, stop) as run:  # checkpoint or initial weights, model, engine
                train(run)
            return finish(run)


def check_steps_are_pauses(config: ResolvedConfig) -> None:
    """Check that an objective of the user's that asks for runs of pauses gets some: fillers are no pauses.

    Args:
        config: Configuration of a finetuning run.

    Raises:
        ConfigError: It would get the last row of each target only.
    """
    plan, filler = loss_plan(config.objective), config.finetune.filler
    if plan is not None and plan.objective.runs and filler is not None:
        raise ConfigError(
            f"objective.name={config.objective.name}, finetune.filler={filler!r}: expected finetune.filler=null with "
            "an objective that asks for runs of pauses (runs=True), got an ordinary token in their place"
        )


def task_record(task: TaskData, data: TrainingData) -> dict[str, str]:
    """Return digests of a run's examples, their values and its tokenizer, which must be the same on every rank.

    Args:
        task: The training examples.
        data: The same, with the held-out windows.
    """
    valid = xxhash.xxh3_128()
    windows = data.valid.windows if data.valid else None
    for example in windows.examples if isinstance(windows, SupervisedWindows) else ():
        valid.update(np.concatenate([[len(example.prompt)], example.prompt, example.target, example.hints]).tobytes())
        valid.update(b"" if example.values is None else example.values.tobytes())
    values = [each.values for each in task.windows.examples if each.values is not None]
    scores = {"content of task.scores": bytes_digest(np.concatenate(values).tobytes())} if values else {}
    return scores | {
        "content of task.path": task.fingerprint,
        "content of task.path for validation": valid.hexdigest(),
        "content of data.tokenizer": task.tokenizer.fingerprint,
    }


def shorter_warmup(asked: ResolvedConfig, config: ResolvedConfig) -> str | None:
    """Return a line about a warm-up that was shortened to fit the epochs; None where it was not.

    Args:
        asked: Configuration as it was given.
        config: The same with the number of steps filled in.
    """
    before, now = asked.optim.warmup_steps, config.optim.warmup_steps
    if before == now:
        return None
    epochs, steps = config.finetune.epochs, config.train.steps
    return f"optim.warmup_steps={now}, not {before}: finetune.epochs={epochs:g} of these examples are {steps:,} steps"


def training_data(data: TaskData) -> TrainingData:
    """Return a task's windows as the training loop sees them.

    Args:
        data: The training examples.

    Raises:
        PauseMegatronError: Validation is on, and a held-out example is missing or malformed.
    """
    valid = without_pauses = None
    if data.config.validation.every and data.config.task.held_out != 0:
        valid, without_pauses = (HeldOut(windows, windows.windows_in_epochs(1)) for windows in held_out(data))
    return TrainingData(
        train=data.windows,
        valid=valid,
        valid_without_pauses=without_pauses,
        tokenizer=data.tokenizer,
        pause_ids=data.pause_ids,
        fingerprint=data.fingerprint,
        description=data.description,
        show=lambda batch: show_window(batch, data.tokenizer),
        auxiliary_heads=data.auxiliary_heads,
    )


def show_window(batch: MicroBatch, tokenizer: Tokenizer) -> str:
    """Return the examples of a micro-batch's first window, one per line: prefix with its pauses, then [[target]].

    Pauses within a target are shown in it; they are read and not predicted.

    Args:
        batch: The micro-batch, on the CPU.
        tokenizer: Tokenizer of the run.
    """
    size = batch.tokens.shape[0]
    of_first = batch.target_rows % size == 0
    positions, targets = batch.target_rows[of_first] // size, batch.targets[of_first]
    segments = batch.segments[0] if batch.segments is not None else batch.tokens.new_zeros(batch.tokens.shape[1])
    decode = Continuations(tokenizer.encode, tokenizer.decode).decode
    lines = []
    for segment in segments[positions].unique().tolist():
        supervised = segments[positions] == segment
        start = int(segments.eq(segment).nonzero()[0])
        first, last = (int(positions[supervised][which]) for which in (0, -1))
        read = batch.tokens[0, first + 1 : last + 1].tolist()  # the target but its last token, with its pauses
        target = decode([*read, int(targets[supervised][-1])])
        lines.append(f"{tokenizer.decode(batch.tokens[0, start : first + 1].tolist())}[[{target}]]")
    return "\n".join(lines)
