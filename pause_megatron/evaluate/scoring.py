"""From examples to per-record outcomes: what the model answers behind prompt and pauses, and what that is worth.

Generation tasks are decoded greedily; choice tasks are scored by the log-likelihood of every choice. A record's outcome
is a function of the record, the model and the settings: batches only save time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pause_megatron.errors import DataError
from pause_megatron.evaluate.journal import Record
from pause_megatron.evaluate.results import Settings
from pause_megatron.inference import Limits, PauseGenerator, Prompting
from pause_megatron.inference.loading import DTYPES
from pause_megatron.tasks import METRICS, Example, Task, answer_in


@dataclass(frozen=True)
class Prepared:
    """An example as token ids that fit the model.

    Attributes:
        example: it.
        prompt: ids, a BOS included, pauses not.
        choices: ids of each choice; none if the task is only decoded.
        cut: tokens taken away from the left of the prompt.
    """

    example: Example
    prompt: list[int]
    choices: list[list[int]]
    cut: int


@dataclass
class Cost:
    """What a batch cost: calls of the model, token positions computed (padding not), seconds."""

    forward_passes: int = 0
    positions: int = 0
    seconds: float = field(default=0.0, compare=False)

    def add(self, cost: Any) -> None:
        """Add the cost of a call of the generator."""
        self.forward_passes += cost.forward_passes
        self.positions += cost.positions


class Scorer:
    """Asks one task's examples of one model under one setting.

    Args:
        generator: the model.
        task: what is asked, how it is decoded and measured.
        settings: pauses and the like.
        batch_size: rows of a forward pass at most.

    Raises:
        ConfigError: the settings do not fit the model, or leave no room for a prompt.
    """

    def __init__(self, generator: PauseGenerator, task: Task, settings: Settings, batch_size: int) -> None:
        self.task = task
        self.settings = settings
        self._generator = generator
        self._batch_size = batch_size
        self._decodes = any(METRICS[name].reads == "text" for name in task.metrics)
        self._chooses = any(METRICS[name].reads == "choices" for name in task.metrics)
        check_settings(generator, settings)

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]:
        """Encode the examples. The longest come first, so that the rows of a batch need little padding.

        The order depends on nothing but examples, model and settings.

        Raises:
            DataError: an example that cannot be asked, or an id that occurs twice.
        """
        seen: dict[str, int] = {}
        for index, example in enumerate(examples):
            if seen.setdefault(example.id, index) != index:
                raise DataError(f"{self.task.name}: id {example.id!r}: expected once, got twice")
        return sorted((self._fit(example) for example in examples), key=lambda item: -len(item.prompt))

    def batches(self, prepared: Sequence[Prepared]) -> Iterator[Sequence[Prepared]]:
        """Prepared examples, as many at a time as fill a forward pass."""
        widest = max((len(item.choices) for item in prepared), default=0)
        size = self._batch_size if self._decodes else max(1, self._batch_size // max(widest, 1))
        return (prepared[start : start + size] for start in range(0, len(prepared), size))

    def ask(self, batch: Sequence[Prepared]) -> tuple[list[Record], dict[str, Any]]:
        """Outcomes of a batch, and its cost."""
        begun, cost = time.perf_counter(), Cost()
        answers = self._decode(batch, cost) if self._decodes else [None] * len(batch)
        likelihoods = self._choose(batch, cost) if self._chooses else [None] * len(batch)
        records = [self._record(*row) for row in zip(batch, answers, likelihoods, strict=True)]
        cost.seconds = time.perf_counter() - begun
        return records, vars(cost)

    def _fit(self, example: Example) -> Prepared:
        """Encode an example; where it is too long for the model, cut its prompt from the left, behind a BOS."""
        encoder = self._generator.encoder
        where = f"{self.task.name}: record {example.id!r}"
        if self._chooses and not all(example.choices):
            raise DataError(f"{where}: choices: expected texts, none of them empty, got {example.choices!r}")
        try:
            prompt = encoder.encode(example.prompt)
            choices = [encoder.encode_continuation(text) for text in example.choices] if self._chooses else []
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        new = max([self.task.decoding.max_new_tokens if self._decodes else 0, *map(len, choices)])
        room = room_for_prompt(self._generator, self.settings.pauses, new)
        kept = cut_left(prompt, encoder.leading, room)
        if not kept and not (self.settings.pauses and not prompt):
            raise DataError(
                f"{where}: prompt: expected room for at least one token, but {self.settings.pauses} pauses and {new} "
                f"new tokens leave {room} positions, of {len(prompt)} that it has"
            )
        return Prepared(example, kept, choices, len(prompt) - len(kept))

    def _decode(self, batch: Sequence[Prepared], cost: Cost) -> list[tuple[str, int]]:
        """Text and number of new tokens of each answer."""
        generation = self._generator.generate(
            [item.prompt for item in batch],
            max_new_tokens=self.task.decoding.max_new_tokens,
            limits=Limits(stop=self.task.decoding.stop),
            **_options(self.settings),
        )
        cost.add(generation.cost)
        return [(completion.text, len(completion.ids)) for completion in generation.completions]

    def _choose(self, batch: Sequence[Prepared], cost: Cost) -> list[list[float]]:
        """Log-likelihood of every choice of each record, in nats."""
        rows = [(item.prompt, choice) for item in batch for choice in item.choices]
        sums: list[float] = []
        for start in range(0, len(rows), self._batch_size):
            prompts, choices = zip(*rows[start : start + self._batch_size], strict=True)
            scores, spent = self._generator.score(prompts, choices, **_options(self.settings))
            sums += [score.log_likelihood for score in scores]
            cost.add(spent)
        found = iter(sums)
        likelihoods = [[next(found) for _ in item.choices] for item in batch]
        for item, values in zip(batch, likelihoods, strict=True):
            if not all(map(math.isfinite, values)):
                raise DataError(
                    f"{self.task.name}: record {item.example.id!r}: expected finite log-likelihoods, got {values} "
                    f"(where the model runs in fp16, try --dtype bf16 or fp32)"
                )
        return likelihoods

    def _record(self, item: Prepared, answer: tuple[str, int] | None, likelihoods: list[float] | None) -> Record:
        """What stands in the samples file."""
        example = item.example
        record: Record = {"id": example.id}
        if answer is not None:
            record["prediction"] = answer_in(answer[0], self.task.decoding.stop)
        if likelihoods is not None:
            record["log_likelihoods"] = likelihoods
        of_text = (record.get("prediction"), example.references)
        of_choices = (likelihoods, example.choices, example.gold)
        record["scores"] = {
            name: METRICS[name].per_record(*(of_text if METRICS[name].reads == "text" else of_choices))
            for name in self.task.metrics
        }
        new = sum(map(len, item.choices)) + (0 if answer is None else answer[1])
        record["tokens"] = {"prompt": len(item.prompt), "pauses": self.settings.pauses, "new": new}
        record["cut"] = item.cut
        return record


def own_settings(
    generator: PauseGenerator,
    *,
    pauses: int | None = None,
    location: str | None = None,
    filler: str | None = None,
    prefix_attention: str | None = None,
    seed: int = 0,
) -> Settings:
    """Settings in which what is None is the model's own: what it was finetuned with, as its config.json says.

    Args:
        filler: "" asks for pauses, whatever the model's own filler.
    """
    prompting = generator.pause.override(location=location, filler=filler, prefix_attention=prefix_attention)
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    return Settings(
        pauses=generator.default_pauses if pauses is None else pauses,
        location=prompting.location,
        filler=prompting.filler,
        prefix_attention=prompting.prefix_attention,
        seed=seed,
        dtype=dtypes.get(generator.model.dtype, str(generator.model.dtype)),
    )


def _options(settings: Settings) -> dict[str, Any]:
    """Settings as the generator takes them."""
    prompting = Prompting(settings.location, settings.filler, settings.prefix_attention)
    return {"pauses": settings.pauses, "prompting": prompting}


def check_settings(generator: PauseGenerator, settings: Settings) -> None:
    """Check what can be checked without an example, by one token behind a short prompt.

    Raises:
        ConfigError: pauses for a model that has none, a filler of several tokens, more pauses than positions.
    """
    generator.generate(["a"], max_new_tokens=1, **_options(settings))


def room_for_prompt(generator: PauseGenerator, pauses: int, new: int) -> int:
    """Positions that pauses and new tokens leave for a prompt; a very large number where the model names no limit."""
    available = getattr(generator.model.config, "max_position_embeddings", None)
    return 1 << 40 if available is None else available - pauses - new


def cut_left(ids: list[int], leading: list[int], room: int) -> list[int]:
    """The right end of a prompt's ids, behind what the tokenizer puts before every text (a BOS).

    Args:
        ids: [tokens].
        leading: what the tokenizer puts before a text; kept where the prompt has it and there is room for text too.
        room: positions, which may be negative.
    """
    if len(ids) <= room:
        return ids
    head = leading if ids[: len(leading)] == leading and len(leading) < room else []
    return [*head, *ids[len(ids) - (room - len(head)) :]] if room > 0 else []
