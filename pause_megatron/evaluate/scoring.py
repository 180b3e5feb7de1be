"""Scoring of examples: answers and log-likelihoods after prompt and pauses, and the metrics of each record.

Generation tasks are decoded greedily; choice tasks are scored by the log-likelihood of every choice. The outcome of a
record depends on the record, the model and the settings, and not on its batch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pause_megatron.errors import DataError
from pause_megatron.evaluate.identity import Settings
from pause_megatron.evaluate.stored import BatchCost, Sample, TokenCounts
from pause_megatron.inference import Cost, DecodingPauses, Limits, PauseGenerator, Prompting, Score
from pause_megatron.inference.loading import DTYPES
from pause_megatron.inference.places import Places
from pause_megatron.tasks import Example, Task, answer_in, metrics_of


@dataclass(frozen=True)
class PreparedExample:
    """A tokenized example that fits the model.

    Attributes:
        example: The source example.
        prompt: Token ids of the prompt, with a BOS and without pauses.
        choices: Token ids of each choice; empty if the task is only decoded.
        cut: Tokens cut from the left of the prompt.
    """

    example: Example
    prompt: list[int]
    choices: list[list[int]]
    cut: int


@dataclass(frozen=True)
class DecodedAnswer:
    """A decoded answer.

    Attributes:
        text: The generated text.
        tokens: Number of generated tokens.
        inside: Pauses within prompt and answer.
    """

    text: str
    tokens: int
    inside: int = 0


class Scorer:
    """Scorer of examples of one task with one model under one setting.

    Args:
        generator: The model.
        task: The task; it gives decoding and metrics.
        settings: Pauses and dtype.
        batch_size: Largest number of rows of a forward pass.

    Raises:
        ConfigError: The settings do not fit the model, or leave no room for a prompt.
    """

    def __init__(self, generator: PauseGenerator, task: Task, settings: Settings, batch_size: int) -> None:
        self.task = task
        self.settings = settings
        self._generator = generator
        self._batch_size = batch_size
        self._metrics = metrics_of(task)
        self._decodes = any(metric.reads == "text" for metric in self._metrics.values())
        self._chooses = any(metric.reads == "choices" for metric in self._metrics.values())
        check_settings(generator, settings)

    def prepare(self, examples: Sequence[Example]) -> list[PreparedExample]:
        """Tokenize the examples and sort them, longest prompt first, so that batches need little padding.

        The order depends on examples, model and settings only.

        Raises:
            DataError: An example does not fit the model, or an id occurs twice.
        """
        seen: dict[str, int] = {}
        for index, example in enumerate(examples):
            if seen.setdefault(example.id, index) != index:
                raise DataError(f"{self.task.name}: id {example.id!r}: expected once, got twice")
        return sorted((self._fit(example) for example in examples), key=lambda item: -len(item.prompt))

    def batches(self, prepared: Sequence[PreparedExample]) -> Iterator[Sequence[PreparedExample]]:
        """Yield batches of prepared examples, each as large as a forward pass allows."""
        widest = max((len(item.choices) for item in prepared), default=0)
        size = self._batch_size if self._decodes else max(1, self._batch_size // max(widest, 1))
        return (prepared[start : start + size] for start in range(0, len(prepared), size))

    def score(self, batch: Sequence[PreparedExample]) -> tuple[list[Sample], BatchCost]:
        """Return the outcomes of a batch, and its cost."""
        start = time.perf_counter()
        costs: list[Cost] = []
        answers: Sequence[DecodedAnswer | None] = self._decode(batch, costs) if self._decodes else [None] * len(batch)
        inside = [0] * len(batch)
        likelihoods: Sequence[list[float] | None] = (
            self._log_likelihoods(batch, costs, inside) if self._chooses else [None] * len(batch)
        )
        samples = [self._sample(*row) for row in zip(batch, answers, likelihoods, inside, strict=True)]
        return samples, BatchCost(
            records=len(batch),
            forward_passes=sum(cost.forward_passes for cost in costs),
            positions=sum(cost.positions for cost in costs),
            seconds=time.perf_counter() - start,
        )

    def _fit(self, example: Example) -> PreparedExample:
        """Tokenize an example; a prompt that is too long for the model is cut from the left, after a BOS."""
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
        room = room_for_prompt(self._generator, self.settings.pauses, new, _decoding(self.settings))
        size = room
        if self._generator.pause.without_positions is None:
            size = Places(encoder, _decoding(self.settings), ()).longest(prompt, encoder.leading, room)
        kept = cut_left(prompt, encoder.leading, size)
        if not kept and not (self.settings.pauses and not prompt):
            raise DataError(
                f"{where}: prompt: expected room for at least one token, but {self.settings.pauses} pauses and {new} "
                f"new tokens leave {room} positions for its {len(prompt)} tokens"
            )
        return PreparedExample(example, kept, choices, len(prompt) - len(kept))

    def _decode(self, batch: Sequence[PreparedExample], costs: list[Cost]) -> list[DecodedAnswer]:
        """Return the answer of each record, and append the cost."""
        generation = self._generator.generate(
            [item.prompt for item in batch],
            max_new_tokens=self.task.decoding.max_new_tokens,
            limits=Limits(stop=self.task.decoding.stop),
            **_options(self.settings),
        )
        costs.append(generation.cost)
        return [
            DecodedAnswer(each.text, len(each.ids), each.pauses_in_answer + each.prompt_pauses)
            for each in generation.completions
        ]

    def _log_likelihoods(
        self, batch: Sequence[PreparedExample], costs: list[Cost], inside: list[int]
    ) -> list[list[float]]:
        """Return the log-likelihood of every choice of each record in nats; append the costs, count pauses inside."""
        rows = [(item.prompt, choice) for item in batch for choice in item.choices]
        found: list[Score] = []
        for start in range(0, len(rows), self._batch_size):
            prompts, choices = zip(*rows[start : start + self._batch_size], strict=True)
            scores, cost = self._generator.score(prompts, choices, **_options(self.settings))
            found += scores
            costs.append(cost)
        remaining = iter(found)
        of_each = [[next(remaining) for _ in item.choices] for item in batch]
        likelihoods = [[score.log_likelihood for score in each] for each in of_each]
        for index, each in enumerate(of_each):
            inside[index] = each[0].prompt_pauses + sum(n for score in each for _, n in score.answer_pauses)
        for item, values in zip(batch, likelihoods, strict=True):
            if not all(map(math.isfinite, values)):
                raise DataError(
                    f"{self.task.name}: record {item.example.id!r}: expected finite log-likelihoods, got {values} "
                    f"(where the model runs in fp16, try --dtype bf16 or fp32)"
                )
        return likelihoods

    def _sample(
        self, item: PreparedExample, answer: DecodedAnswer | None, likelihoods: list[float] | None, inside: int
    ) -> Sample:
        """Return the line of the samples file."""
        example = item.example
        prediction = None if answer is None else answer_in(answer.text, self.task.decoding.stop)
        text_arguments = (prediction, example.references)
        choice_arguments = (likelihoods, example.choices, example.gold)
        outcome = {"group": example.group or None, "prediction": prediction, "log_likelihoods": likelihoods}
        return Sample(
            id=example.id,
            **{name: value for name, value in outcome.items() if value is not None},
            scores={
                name: metric.per_record(*(text_arguments if metric.reads == "text" else choice_arguments))
                for name, metric in self._metrics.items()
            },
            tokens=TokenCounts.of(
                prompt=len(item.prompt),
                pauses=self.settings.pauses,
                new=sum(map(len, item.choices)) + (0 if answer is None else answer.tokens),
                inside=inside + (0 if answer is None else answer.inside),
            ),
            cut=item.cut,
        )


def own_settings(
    generator: PauseGenerator,
    *,
    pauses: int | None = None,
    location: str | None = None,
    filler: str | None = None,
    prefix_attention: str | None = None,
    seed: int = 0,
    decoding: DecodingPauses | None = None,
) -> Settings:
    """Return settings in which the model's own value (`pause` in its config.json) replaces each None.

    Args:
        generator: The model.
        pauses: Number of pauses, M.
        location: "append" or "prepend".
        filler: Text of the token that replaces `<pause>`; "" asks for pauses even if the model has a filler.
        prefix_attention: "causal" or "bidirectional".
        seed: Label of the results.
        decoding: Pauses within answers.
    """
    prompting = generator.pause.override(location=location, filler=filler, prefix_attention=prefix_attention)
    decoding = generator.pause.decoding if decoding is None else decoding
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    return Settings(
        pauses=generator.default_pauses if pauses is None else pauses,
        location=prompting.location,
        filler=prompting.filler,
        prefix_attention=prompting.prefix_attention,
        seed=seed,
        dtype=dtypes.get(generator.model.dtype, str(generator.model.dtype)),
        decoding=json.dumps(decoding.document(), sort_keys=True) if decoding.active else "",
    )


class _Options(TypedDict):
    """The generator's keyword arguments for the pauses."""

    pauses: int
    prompting: Prompting
    decoding: DecodingPauses


def _options(settings: Settings) -> _Options:
    """Return the settings as keyword arguments of the generator."""
    prompting = Prompting(settings.location, settings.filler, settings.prefix_attention)
    return {"pauses": settings.pauses, "prompting": prompting, "decoding": _decoding(settings)}


def _decoding(settings: Settings) -> DecodingPauses:
    return DecodingPauses(**json.loads(settings.decoding or "{}"))


def check_settings(generator: PauseGenerator, settings: Settings) -> None:
    """Check settings against the model by decoding one token after a short prompt.

    Raises:
        ConfigError: The model has no pause token, the filler is several tokens, or the pauses exceed the positions.
    """
    generator.generate(["a"], max_new_tokens=1, **_options(settings))


def room_for_prompt(generator: PauseGenerator, pauses: int, new: int, decoding: DecodingPauses) -> int:
    """Return the positions that pauses and new tokens leave for a prompt; very large for a model without a limit.

    Args:
        generator: The model.
        pauses: Number of pauses.
        new: Number of new tokens.
        decoding: Pauses within answers; for each the maximum is left.
    """
    available = getattr(generator.model.config, "max_position_embeddings", None)
    # Of `every` the largest number over all lengths of the prompt.
    counted = range(decoding.every or 1) if decoding.in_prompt else range(1)
    pauses += max(Places(generator.encoder, decoding, ()).most(new, number) for number in counted)
    pauses = pauses if generator.pause.without_positions is None else 0
    return 1 << 40 if available is None else available - pauses - new


def cut_left(ids: list[int], leading: list[int], room: int) -> list[int]:
    """Return the right end of a prompt's ids, after the tokens that the tokenizer puts before every text (a BOS).

    Args:
        ids: Token ids of the prompt, [tokens].
        leading: Token ids that the tokenizer puts before a text. They are kept if there is room for text too.
        room: Available positions; may be negative.
    """
    if len(ids) <= room:
        return ids
    head = leading if ids[: len(leading)] == leading and len(leading) < room else []
    return [*head, *ids[len(ids) - (room - len(head)) :]] if room > 0 else []
