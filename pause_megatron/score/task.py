"""Scoring of a task: the loss or the entropy of a model at each token of its answers, given their prompts.

Placement within the answers of a finetuning uses the values (`task.scores`). Batches hold examples of similar length,
so that little is padding; they change a value in its last digits only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pause_megatron.config.finetune_schema import TaskSection
from pause_megatron.data.supervised.answer_values import AnswerValues
from pause_megatron.data.supervised.examples import EncodedExample, encode_examples
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.errors import DataError
from pause_megatron.evaluate.fingerprint import model_fingerprint
from pause_megatron.score.model import ModelFacts, find_devices, load_model, read_facts, sizes
from pause_megatron.score.unit_scorer import describe
from pause_megatron.score.values import Scorer
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
        device: "cpu", "cuda", or "auto" for a GPU where there is one.
        dtype: Data type of the forward pass, "fp32", "bf16" or "fp16"; None for that of the stored weights.
        overwrite: Replace a file.
    """

    path: str | None = None
    limit: int | None = None
    held_out: float = TaskSection.model_fields["held_out"].default
    kind: Literal["loss", "entropy"] = "loss"
    context: int | None = None
    batch_tokens: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class TaskScored:
    """The result of `score_task`.

    Attributes:
        examples: Number of examples.
        values: Number of tokens of their targets, EOD included.
        mean: Mean of the values.
        truncated: Examples whose prompt is longer than the context, and is read from its end.
        seconds: Wall-clock time.
    """

    examples: int
    values: int
    mean: float
    truncated: int
    seconds: float


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
        DataError: A record or the model cannot be used, or the file exists or cannot be written.
    """
    begun, output, folder = time.perf_counter(), Path(output), Path(folder)
    _require_free(output, overwrite=options.overwrite)
    task, facts = load_task(task_name), read_facts(folder)
    if facts.encoder.pause.prompting.prefix_attention != "causal":
        raise DataError(
            f"{folder}: expected a model with causal attention within prompts, got one finetuned with "
            "finetune.prefix_attention=bidirectional; score with the model that it was finetuned from"
        )
    context, batch_tokens = sizes(options.context, options.batch_tokens, facts)
    device = find_devices(options.device)[0]
    tokenizer = load_tokenizer(folder)
    encoded = encode_examples(_records(task, options), tokenizer)
    rows = _rows(encoded, context, facts, tokenizer)
    digest = model_fingerprint(folder, report=report)
    scorer = Scorer(load_model(folder, device, options.dtype), facts.pauses, options.kind)
    values: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(rows)
    total = sum(example.target.size for example in encoded)
    done, stage = 0, f"score {task.name}"
    report(stage, done, total)
    for batch in _batches(rows, batch_tokens):
        for number, found in zip(batch, _values(scorer, [rows[each] for each in batch], encoded, batch), strict=True):
            values[number] = found
            done += found.size
        report(stage, done, total)
    metadata = {
        **{"task": task.name, "kind": options.kind, "model": folder.absolute().name, "model_digest": digest},
        **{"tokenizer": tokenizer.fingerprint, "context": str(context), "dtype": options.dtype or facts.dtype},
    }
    try:
        AnswerValues.write(output, encoded, values, metadata)
    except OSError as error:
        raise DataError(f"cannot write {error.filename or output}: {os.strerror(error.errno or 0)}") from None
    pairs = zip(rows, encoded, strict=True)
    truncated = sum(row.size < example.prompt.size + example.target.size for row, example in pairs)
    mean = float(np.concatenate(values).mean(dtype=np.float64))
    return TaskScored(len(encoded), total, mean, truncated, time.perf_counter() - begun)


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
                f"{context:,}, got {example.target.size:,}"
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


def _batches(rows: Sequence[np.ndarray], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of rows in batches of similar length, the longest first, as memory may not suffice."""
    batch: list[int] = []
    for number in sorted(range(len(rows)), key=lambda number: (-rows[number].size, number)):
        if batch and (len(batch) + 1) * (rows[batch[0]].size - 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    yield batch


def _values(
    scorer: Scorer, rows: Sequence[np.ndarray], encoded: Sequence[EncodedExample], numbers: Sequence[int]
) -> list[np.ndarray]:
    """Return the values of the targets of a batch, fp32 [T] each."""
    inputs = np.zeros((len(rows), rows[0].size - 1), dtype=np.int64)
    targets, scored = np.zeros_like(inputs), np.zeros(inputs.shape, dtype=bool)
    counts = [encoded[number].target.size for number in numbers]
    for at, (row, count) in enumerate(zip(rows, counts, strict=True)):
        inputs[at, : row.size - 1], targets[at, : row.size - 1] = row[:-1], row[1:]
        scored[at, row.size - 1 - count : row.size - 1] = True
    try:
        found = scorer.values(*map(torch.from_numpy, (inputs, targets, scored))).numpy()
    except (RuntimeError, MemoryError) as error:
        raise DataError(f"example {encoded[numbers[0]].id}: {describe(error)}") from None
    parts = np.split(found, np.cumsum(counts)[:-1])
    for number, part in zip(numbers, parts, strict=True):
        if not np.isfinite(part).all():
            raise DataError(
                f"example {encoded[number].id}: expected finite values, got some that are not; compute with --dtype "
                "fp32, or check the model"
            )
    return parts
