"""What a task is: the protocol that finetuning and evaluation use, and the kind that a YAML file declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pydantic import Field, field_validator, model_validator

from pause_megatron.config.schema import Section
from pause_megatron.config.spelling import nearest
from pause_megatron.tasks.metrics import METRICS
from pause_megatron.tasks.records import TRANSFORMS
from pause_megatron.tasks.template import ANSWER, names_in

Split = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question with what counts as its answer.

    Attributes:
        id: unique within the split: the record's number from 1, and for a conversation the turn ("17", "17.3").
        prompt: never empty, never ends in white space.
        target: what finetuning learns; begins with the blank that separates it from the prompt, where there is one.
        references: accepted answers; for CoQA one per human, repeated where two humans agree.
        choices: continuations for option scoring, written as `target` is; () where the task has none.
        gold: index of the right choice; None where the task has none.
    """

    id: str
    prompt: str
    target: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    gold: int | None = None


class Dataset(Section):
    """Where the records are on the Hugging Face hub. A local folder holds the same records as JSON lines."""

    path: str = Field(min_length=1, description="data set on the hub, OWNER/NAME")
    config: str | None = Field(None, description="its configuration, where it has several")
    revision: str | None = Field(None, description="branch, tag or commit; default: the newest")


class Splits(Section):
    """What the data set calls the two splits that are used."""

    train: str | None = Field(None, description="split for finetuning; null: there is none")
    eval: str = Field(description="split for evaluation")


class Decoding(Section):
    """How an answer is generated. Always greedy."""

    max_new_tokens: int = Field(ge=1, description="tokens of the longest answer")
    stop: tuple[str, ...] = Field((), description="texts that end an answer; they are no part of it")


class FinetuneDefaults(Section):
    """What finetuning takes where the run's configuration is silent."""

    pauses: int = Field(10, ge=0, description="pauses between prompt and target (M_ft)")


@runtime_checkable
class Task(Protocol):
    """What finetuning and evaluation need of a task. An object of this shape plugs in as 'module:attribute'.

    Attributes:
        name: for results and messages.
        kind: "generate": the answer is decoded; "choice": the choices' log-likelihoods are compared.
        folder: the task's folder under a folder of all tasks (`--task-path ROOT`).
        metrics: names in METRICS.
        primary: the one of them that stands in tables.
    """

    name: str
    kind: Literal["generate", "choice"]
    folder: str
    metrics: tuple[str, ...]
    primary: str
    decoding: Decoding
    finetune: FinetuneDefaults

    def examples(self, split: Split, path: str | None, limit: int | None) -> list[Example]:
        """The first `limit` (None: all) examples of a split, in a fixed order; `path` is the user's task.path."""
        ...


class DeclaredTask(Section):
    """A task that a YAML file declares. The file's name is the task's; nothing in it is executed.

    A record becomes `transform`'s records (none: itself), and each of these an Example: names in braces in `prompt` and
    `target` stand for its text fields, `{answer}` in `target` for an accepted answer. Paths (`answers.text`) lead to a
    text or a list of texts.
    """

    name: str = Field(min_length=1, description="the file's name without .yaml")
    kind: Literal["generate", "choice"] = Field(description="generate: decode the answer; choice: score the options")
    dataset: Dataset
    folder: str = Field(min_length=1, description="the task's folder under a folder of all tasks; default: the name")
    splits: Splits
    transform: str | None = Field(None, description="named function of tasks/records.py that prepares a record")
    prompt: str = Field(min_length=1, description="template of what the model reads")
    target: str = Field(" {answer}", description="template of what it learns to write, and of each choice")
    references: str | None = Field(None, description="path of the accepted answers; default: the right choice")
    choices: tuple[str, ...] = Field((), description="path of a list of options, or several paths of one each")
    gold: str | None = Field(None, description="path of the right option's index, from 0")
    metrics: tuple[str, ...] = Field(min_length=1, description="names in METRICS")
    primary: str = Field(description="the metric that stands in tables")
    decoding: Decoding
    finetune: FinetuneDefaults = FinetuneDefaults()

    @field_validator("choices", "metrics", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("transform")
    @classmethod
    def _known_transform(cls, name: str | None) -> str | None:
        if name is not None and name not in TRANSFORMS:
            raise ValueError(f"expected one of {', '.join(TRANSFORMS)}; came {name!r}{nearest(name, TRANSFORMS)}")
        return name

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in METRICS:
                raise ValueError(f"expected names of {', '.join(METRICS)}; came {name!r}{nearest(name, METRICS)}")
        return names

    @field_validator("prompt")
    @classmethod
    def _prompt_hides_the_answer(cls, template: str) -> str:
        if ANSWER in names_in(template):
            raise ValueError(f"expected no {{{ANSWER}}} in the prompt: it would give the answer away; it is for target")
        return template

    @field_validator("target")
    @classmethod
    def _target_has_the_answer(cls, template: str) -> str:
        if ANSWER not in names_in(template):
            raise ValueError(f"expected {{{ANSWER}}} in the target; came {template!r}")
        return template

    @model_validator(mode="after")
    def _fits_together(self) -> DeclaredTask:
        if bool(self.choices) != (self.gold is not None):
            raise ValueError("choices and gold: expected both or neither")
        if not self.choices and self.references is None:
            raise ValueError("references: expected the path of the accepted answers, or choices and gold")
        if self.kind == "choice" and not self.choices:
            raise ValueError("kind choice: expected choices and gold")
        if self.primary not in self.metrics:
            raise ValueError(f"primary: expected one of metrics ({', '.join(self.metrics)}); came {self.primary!r}")
        for name in self.metrics:
            if METRICS[name].reads == "choices" and not self.choices:
                raise ValueError(f"metrics: {name} compares choices; expected choices and gold")
        if METRICS[self.primary].reads != ("choices" if self.kind == "choice" else "text"):
            raise ValueError(f"primary: {self.primary} does not judge what kind {self.kind} gives")
        return self

    def examples(self, split: Split, path: str | None = None, limit: int | None = None) -> list[Example]:
        """See `Task.examples`. `path`: folder of JSON lines; None: the Hugging Face hub."""
        from pause_megatron.tasks.declared import declared_examples

        return declared_examples(self, split, path, limit)
