"""What a task is to finetuning and evaluation, and the examples that it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pydantic import Field

from pause_megatron.config.schema import Section

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
