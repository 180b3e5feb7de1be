"""Scoring of a task: the loss or the entropy of a model at each token of its answers, given their prompts.

Placement within the answers of a finetuning uses the values (`task.scores`). The units are in OUTPUT.parts/, from which
the same command continues after a kill. The bytes of the file do not depend on the number of processes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from pause_megatron.config.finetune_schema import TaskSection
from pause_megatron.data.supervised.answer_values import AnswerValues, example_digest
from pause_megatron.data.supervised.examples import EncodedExample, encode_examples
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.evaluate.fingerprint import model_fingerprint
from pause_megatron.files.digest import bytes_digest
from pause_megatron.files.durable import only_file_writer
from pause_megatron.score.answer_units import AnswerUnit, answer_units, in_order
from pause_megatron.score.compute import compute_units, storage_errors
from pause_megatron.score.model import ModelFacts, find_devices, read_facts, sizes
from pause_megatron.score.plan import AnswerPlan, Parts, UnitConfig
from pause_megatron.score.units import unit_tokens
from pause_megatron.tasks import Example, Task, load_task, read_examples
from pause_megatron.terminal.progress import Report, no_report


@dataclass(frozen=True)
class TaskScoreOptions:
    """Options of the scoring of a task.

    Attributes:
        path: Folder with the task's records; None reads the Hugging Face Hub.
        limit: As `task.limit` of the finetuning; None: all records.
        held_out: As `task.held_out` of the finetuning; it matters with a limit and in few-shot prompts only.
        kind: "loss" of each token, or "entropy" of its prediction, in nats.
        context: Largest number of tokens that the model reads; None for 2048, or fewer of a smaller model.
        batch_tokens: Largest number of tokens of a forward pass; None for 8192, or the context.
        processes: Number of processes; None for one each core that memory allows, or one each GPU.
        device: "cpu", "cuda", or "auto" for GPUs where there are any.
        dtype: Data type of the forward pass, "fp32", "bf16" or "fp16"; None for that of the stored weights.
        overwrite: Replace a file, or unfinished units, of other options.
    """

    path: str | None = None
    limit: int | None = None
    held_out: float = TaskSection.model_fields["held_out"].default
    kind: Literal["loss", "entropy"] = "loss"
    context: int | None = None
    batch_tokens: int | None = None
    processes: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class TaskScored:
    """The result of `score_task`.

    Attributes:
        examples: Number of examples.
        values: Number of tokens of their targets, EOD included.
        truncated: Examples whose prompt is longer than the context, and is read from its end.
        mean: Mean of the values; None if there was nothing to do.
        reused: Number of values that earlier runs had computed.
        seconds: Wall-clock time of this run.
        processes: Number of processes; 0 if the file existed with the same examples, model and options.
    """

    examples: int
    values: int
    truncated: int
    mean: float | None
    reused: int
    seconds: float
    processes: int


def score_task(
    task_name: str, folder: str | Path, output: str | Path, options: TaskScoreOptions, report: Report = no_report
) -> TaskScored:
    """Write a file with a value for each token of the answers of a task's training records.

    Examples are encoded with the model's tokenizer as a finetuning encodes them. No pauses are read, and the logits of
    a model's pauses take no part.

    Args:
        task_name: `task.name`.
        folder: What `export-hf` wrote, or another transformers folder with safetensors.
        output: The file; it appears whole, at the end.
        options: See there.
        report: Progress callback.

    Raises:
        ConfigError: No such task, or an option that does not fit the model or this machine.
        DataError: A record or the model cannot be used, the file exists or cannot be written, or a process was killed.
    """
    begun, output, folder = time.perf_counter(), Path(output), Path(folder)
    _require_free(output, overwrite=options.overwrite or _plan_of(output) is not None)
    task, facts = load_task(task_name), read_facts(folder)
    if facts.encoder.pause.prompting.prefix_attention != "causal":
        raise DataError(
            f"{folder}: expected a model with causal attention within prompts, got one finetuned with "
            "finetune.prefix_attention=bidirectional; score with the model that it was finetuned from"
        )
    context, batch_tokens = sizes(options.context, options.batch_tokens, facts)
    devices = find_devices(options.device)
    tokenizer = load_tokenizer(folder)
    encoded = encode_examples(_records(task, options), tokenizer)
    rows = _rows(encoded, context, facts, tokenizer)
    plan = AnswerPlan(
        device="cpu" if devices == ("cpu",) else "cuda",
        unit_tokens=unit_tokens(sum(row.size for row in rows)),
        examples=bytes_digest(np.array([example_digest(example) for example in encoded], dtype="<i8").tobytes()),
        kind=options.kind,
        model_digest=model_fingerprint(folder, report=report),
        context=context,
        compute=options.dtype or facts.dtype,
        batch_tokens=batch_tokens,
    )
    config = UnitConfig(_beside(output, "parts"), str(folder), devices, facts.pauses, plan, AnswerUnit.batches)
    pairs = list(zip(rows, encoded, strict=True))
    truncated = sum(row.size < example.prompt.size + example.target.size for row, example in pairs)
    counts = len(encoded), sum(example.target.size for example in encoded), truncated
    with storage_errors(output), only_file_writer(output, _beside(output, "lock"), str(output)):
        parts, there = Parts(config.folder, plan), _plan_of(output)
        if there is not None and there.gives_values_of(plan):
            if parts.begun:  # a kill after the file was written left them
                parts.remove()
            return TaskScored(*counts, None, counts[1], time.perf_counter() - begun, 0)
        _require_free(output, overwrite=options.overwrite)
        units = list(answer_units(rows, encoded, batch_tokens, plan.unit_tokens))
        processes, reused = compute_units(
            units, config, options.processes, f"score {task.name}", report, overwrite=options.overwrite
        )
        values = in_order(units, parts.read(units))
        metadata = {
            "task": task.name,
            "kind": plan.kind,
            "model": folder.absolute().name,
            "model_digest": plan.model_digest,
            "tokenizer": tokenizer.fingerprint,
            "context": str(context),
            "dtype": plan.compute,
            "tokens": str(sum(row.size - 1 for row in rows)),  # that the model read
            "plan": plan.model_dump_json(),
        }
        AnswerValues.write(output, encoded, values, metadata)
        parts.remove()
    mean = float(np.concatenate(values).mean(dtype=np.float64))
    return TaskScored(*counts, mean, reused, time.perf_counter() - begun, processes)


def _beside(output: Path, extension: str) -> Path:
    return output.with_name(f"{output.name}.{extension}")


def _plan_of(output: Path) -> AnswerPlan | None:
    """Return the plan of a file that a scoring wrote; None for no file, or another one."""
    with contextlib.suppress(DataError, ValidationError):
        return AnswerPlan.model_validate_json(AnswerValues.read(output).metadata.get("plan", ""))
    return None


def _require_free(output: Path, *, overwrite: bool) -> None:
    if not output.absolute().parent.is_dir():
        raise DataError(f"--output {output}: expected a file in a folder that exists, got none at {output.parent}")
    if output.is_dir() or (output.exists() and not overwrite):
        raise DataError(f"--output {output}: expected a new file, got one that exists; --overwrite replaces a file")


def _records(task: Task, options: TaskScoreOptions) -> list[Example]:
    """Return what a finetuning of these options trains on, and all that it holds out."""
    fraction = options.held_out
    held = read_examples(task, "held-out", options.path, None, fraction) if fraction else []
    return [*read_examples(task, "train", options.path, options.limit, fraction), *held]


def _rows(encoded: Sequence[EncodedExample], context: int, facts: ModelFacts, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the ids of each example, prompt and target, at most context + 1: the last target is never read.

    A prompt that is too long is truncated on the left, as a finetuning truncates it.
    """
    kept, rows = len(tokenizer.leading), []
    for example in encoded:
        room = context + 1 - example.target.size
        if room < max(kept, 1):
            raise DataError(
                f"example {example.id}: expected at most {context + 1 - max(kept, 1):,} target tokens for --context "
                f"{context:,}, got {example.target.size:,}; a model that was trained with longer windows "
                "(data.sequence_length) may read more"
            )
        prompt = example.prompt if example.prompt.size else np.array([tokenizer.eod])
        cut = max(prompt.size - room, 0)
        row = np.concatenate([prompt[:kept], prompt[kept + cut :], example.target]).astype(np.int64)
        wrong = (row >= facts.vocabulary) | ((row >= facts.pauses.start) & (row < facts.pauses.stop))
        if wrong.any():
            raise DataError(
                f"example {example.id}: expected ids below {facts.vocabulary:,} that are no pauses of the model, got "
                f"{row[wrong][0]}"
            )
        rows.append(row)
    return rows
