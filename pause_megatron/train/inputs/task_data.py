"""A task's examples as windows, and the number of steps of their epochs. Builds no engine: `--dry-run` uses it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pause_megatron.config.batching import pause_range
from pause_megatron.config.finetune_schema import TaskSection
from pause_megatron.config.follow import fitting_warmup
from pause_megatron.config.load import resolve, scheduled
from pause_megatron.config.model_from import checkpoint_config, read_config_text
from pause_megatron.config.rules import check, warmup_ends
from pause_megatron.config.schema import ResolvedConfig, ScheduledConfig
from pause_megatron.config.text import read_entries
from pause_megatron.data.supervised.answer_values import AnswerValues
from pause_megatron.data.supervised.answers import AnswerPauses
from pause_megatron.data.supervised.examples import (
    Arrangement,
    EncodedExample,
    continuations,
    encode_examples,
    with_hints,
)
from pause_megatron.data.supervised.windows import SupervisedWindows, summarize
from pause_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from pause_megatron.data.windows.token_texts import token_texts
from pause_megatron.errors import ConfigError, DataError
from pause_megatron.files.digest import bytes_digest
from pause_megatron.tasks import Example, Task, fingerprint, load_task, read_examples


@dataclass(frozen=True)
class TaskData:
    """A task's training examples, encoded.

    Attributes:
        config: Configuration of the run, its number of steps known.
        task: The task that `config.task.name` names.
        windows: Training windows.
        tokenizer: Tokenizer that encoded them.
        pause_ids: The K pause ids.
        fingerprint: Digest of the examples, of the values of their answers, and of the tokenizer.
        values: Values of answers, of `task.scores`; None without them.
    """

    config: ScheduledConfig
    task: Task
    windows: SupervisedWindows
    tokenizer: Tokenizer
    pause_ids: range
    fingerprint: str
    values: AnswerValues | None = None

    @property
    def auxiliary_heads(self) -> int:
        """Number of auxiliary heads: the most hints of an example; 0 without `finetune.auxiliary_heads`."""
        heads = self.windows.arrangement.hints == "heads"
        return max(example.hints.size for example in self.windows.examples) if heads else 0

    @property
    def description(self) -> str:
        """What a step reads and what the first epoch holds, in a few words."""
        facts, finetune = summarize(self.windows), self.config.finetune
        pauses = "pauses" if finetune.filler is None else f"fillers {finetune.filler!r}"
        places = {"pauses": "the pauses", "heads": f"{self.auxiliary_heads} auxiliary heads"}
        place = self.windows.arrangement.hints
        answers = self.windows.arrangement.answers
        within = f", {facts.pauses_in_answers:,} in the answers ({answers.placement})" if answers else ""
        hints = f", {facts.hints:,} hints as targets of {places[place]}" if place else ""
        cut = f", {facts.truncated:,} prompts cut on the left" if facts.truncated else ""
        return (
            f"{self.config.batch.global_size:,} windows; {self.config.task.name}: {facts.examples:,} examples in "
            f"{facts.windows:,} {finetune.batching} windows, {facts.padding:.1%} padding, {finetune.pauses} {pauses} "
            f"each ({finetune.location}, prefix {finetune.prefix_attention}){within}{hints}{cut}"
        )


def open_task(config: ResolvedConfig) -> TaskData:
    """Read and encode the training examples of `task.*`, and fill in the number of steps.

    Args:
        config: Configuration of a finetuning run.

    Raises:
        ConfigError: No such task, no tokenizer, a filler of several tokens, or steps that contradict each other.
        DataError: A malformed record, or an example that does not fit into a window or has no values in `task.scores`;
            it is named.
    """
    if config.task.name is None:
        raise ConfigError("task.name: expected a task to finetune on, got none (--recipe finetune-gsm8k names one)")
    task = load_task(config.task.name)
    config = as_begun(config)
    tokenizer = _tokenizer(config)
    tokenizer.check_pause_ids(config.pause.embeddings)
    pause_ids = range(tokenizer.pause_id, tokenizer.pause_id + config.pause.embeddings)
    examples = read_examples(
        *(task, "train", config.task.path, config.task.limit, config.task.held_out),
        from_start=config.task.held_out is None,
    )
    arrangement = _arrangement(config, tokenizer, pause_ids)
    values = None if config.task.scores is None else AnswerValues.read(config.task.scores)
    encoded = _encoded(examples, tokenizer, arrangement, values)
    windows = SupervisedWindows(encoded, arrangement, seed=config.run.seed, task=task.name)
    content = (fingerprint(examples), tokenizer.fingerprint, tokenizer.eod, tokenizer.pause_id, *_digests(encoded))
    digest = bytes_digest(repr(content).encode())
    return TaskData(with_steps(config, windows), task, windows, tokenizer, pause_ids, digest, values)


def as_begun(config: ResolvedConfig) -> ResolvedConfig:
    """Return the configuration with `task.held_out=null` for a run that began before the key existed, and resumes.

    Args:
        config: Configuration of a finetuning run.
    """
    if config.task.held_out != TaskSection.model_fields["held_out"].default:
        return config
    try:
        path = checkpoint_config(config.run.dir)
        known = {entry.path for entry in read_entries(read_config_text(path), str(path))}
    except ConfigError:  # the run has no checkpoint, or resuming says what is wrong with it
        return config
    if "task.held_out" in known or "task.name" not in known:
        return config
    return config.model_copy(update={"task": config.task.model_copy(update={"held_out": None})})


def held_out(data: TaskData) -> tuple[SupervisedWindows, SupervisedWindows]:
    """Return the windows of `validation.samples` held-out examples: with M_ft pauses, and without.

    They are of the train split. Only with `task.held_out=null` are they the first ones of the evaluation split.

    Args:
        data: The run's training examples; their arrangement is used.

    Raises:
        PauseMegatronError: There are no such examples, or one is malformed.
    """
    config, task = data.config, data.task
    fraction, samples = config.task.held_out, config.validation.samples
    try:
        if fraction is None:
            examples = read_examples(task, "eval", config.task.path, samples, from_start=True)
        else:
            examples = read_examples(task, "held-out", config.task.path, samples, fraction)
    except (ConfigError, DataError) as error:
        reason = f"validation.every={config.validation.every} scores held-out examples; validation.every=0 needs none"
        raise type(error)(f"{error}. {reason}") from None
    arrangement = data.windows.arrangement
    encoded, most = _encoded(examples, data.tokenizer, arrangement, data.values), arrangement.pauses[-1]
    if data.auxiliary_heads and (more := max(example.hints.size for example in encoded)) > data.auxiliary_heads:
        which = next(each.id for each, one in zip(examples, encoded, strict=True) if one.hints.size == more)
        raise DataError(
            f"task {task.name}, held-out example {which}: expected at most {data.auxiliary_heads} hints, the most of a "
            f"training example, got {more}"
        )
    paused = replace(arrangement, pauses=range(most, most + 1))
    plain = replace(arrangement, pauses=range(1), hints=None, answers=None)
    with_pauses, without = (SupervisedWindows(encoded, each, seed=0, task=task.name) for each in (paused, plain))
    return with_pauses, without if most or arrangement.answers else with_pauses


def with_steps(config: ResolvedConfig, windows: SupervisedWindows) -> ScheduledConfig:
    """Return the configuration with `train.steps` filled in from `finetune.epochs`, rounded up to whole steps.

    A warm-up that does not fit becomes a tenth of the run: the steps are unknown before the examples are read.

    Args:
        config: Configuration of the run.
        windows: Its training windows.

    Raises:
        ConfigError: Neither key is given, they contradict each other, or a rule about steps is broken.
    """
    epochs, given = config.finetune.epochs, config.train.steps
    if epochs is None:
        if given is None:
            raise ConfigError("finetune.epochs, train.steps or train.tokens: expected one of them, got none")
        return scheduled(config)
    count = windows.windows_in_epochs(epochs)
    steps = -(-count // config.batch.global_size)
    if given is not None and given != steps:
        raise ConfigError(
            f"expected only one of finetune.epochs and train.steps: {epochs:g} epochs are {count:,} windows, {steps:,} "
            f"steps of batch.global_size={config.batch.global_size}; got train.steps={given}"
        )
    train = config.train.model_copy(update={"steps": steps, "tokens": None})
    config = resolve(config.model_copy(update={"train": train}))
    if warmup_ends(config) is not None:
        optim = config.optim.model_copy(update={"warmup_steps": fitting_warmup(config)})
        config = config.model_copy(update={"optim": optim})
    check(config)
    return scheduled(config)


def _tokenizer(config: ResolvedConfig) -> Tokenizer:
    """Return the tokenizer of `data.tokenizer`, else of `model.from`, else of the run's own checkpoints."""
    if config.data.tokenizer is not None:
        return load_tokenizer(config.data.tokenizer)
    for place in (config.model.from_, config.run.dir):
        try:
            folder = Path(checkpoint_config(place).parent) if place else None
        except ConfigError:
            continue
        if folder is not None:
            return load_tokenizer(folder / "tokenizer")
    raise ConfigError(
        "data.tokenizer: expected the tokenizer to train with, got none; or give model.from, to finetune a checkpoint"
    )


def _arrangement(config: ResolvedConfig, tokenizer: Tokenizer, pause_ids: range) -> Arrangement:
    finetune = config.finetune
    if finetune.filler is not None:
        filler = continuations(tokenizer).filler_id(finetune.filler)
        pause_ids = range(filler, filler + 1)
    return Arrangement(
        sequence_length=config.data.sequence_length,
        pauses=pause_range(finetune.pauses),
        pause_ids=pause_ids,
        location=finetune.location,
        prefix_attention=finetune.prefix_attention,
        batching=finetune.batching,
        leading=len(tokenizer.leading),
        hints="pauses" if finetune.pause_targets else "heads" if finetune.auxiliary_heads else None,
        shared_positions=config.pause.positions == "shared",
        answers=_answers(config, tokenizer),
    )


def _answers(config: ResolvedConfig, tokenizer: Tokenizer) -> AnswerPauses | None:
    placement, pause = config.finetune.answer_placement, config.pause
    if placement is None:
        return None
    return AnswerPauses(placement, config.finetune.answer_rate, pause.run, pause.pattern, token_texts(tokenizer))


def _encoded(
    examples: Sequence[Example], tokenizer: Tokenizer, arrangement: Arrangement, values: AnswerValues | None
) -> list[EncodedExample]:
    encoded = encode_examples(examples, tokenizer)
    if values is not None:
        encoded = values.of(encoded)
    return with_hints(encoded, examples, tokenizer) if arrangement.hints else encoded


def _digests(encoded: Sequence[EncodedExample]) -> tuple[str, ...]:
    """Return the digest of the values of answers; nothing without them, so that earlier digests stay."""
    values = [example.values for example in encoded if example.values is not None]
    return (bytes_digest(np.concatenate(values).tobytes()),) if values else ()
