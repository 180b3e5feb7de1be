"""The interface of a task, and the examples that finetuning and evaluation read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pydantic import Field

from pause_megatron.config.section import Section

Split = Literal["train", "eval"]
Kind = Literal["generate", "choice"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with its training target and its accepted answers.

    Attributes:
        id: Unique within the split: the record's number from 1, and for a conversation the turn ("17", "17.3").
        prompt: What the model reads; never empty, never ends in white space.
        target: What finetuning learns to write. It begins with the blank that separates it from the prompt.
        references: Accepted answers; for CoQA one per human, repeated where two humans agree.
        choices: Continuations for option scoring, written as `target` is; () for a task without options.
        gold: Index of the right choice; None for a task without options.
        group: Name of the text that the example shares with others (an article, a story), the unit of sampling and of
            errors. Empty: the example is its own group.
        hints: Targets for pause positions, or for auxiliary heads; each is one token of text.
    """

    id: str
    prompt: str
    target: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    gold: int | None = None
    group: str = ""
    hints: tuple[str, ...] = ()


class Decoding(Section):
    """Settings of the generation of an answer. Decoding is greedy."""

    max_new_tokens: int = Field(ge=1, description="tokens of the longest answer")
    stop: tuple[str, ...] = Field((), description="texts that end an answer and are no part of it")


class FinetuneDefaults(Section):
    """Settings of finetuning where the run's configuration gives none."""

    pauses: int = Field(10, ge=0, description="pauses between prompt and target (M_ft)")


@runtime_checkable
class Task(Protocol):
    """What finetuning and evaluation need of a task. Any object with these members plugs in as 'module:attribute'."""

    @property
    def name(self) -> str:
        """Name in results and messages."""

    @property
    def kind(self) -> Kind:
        """Kind of scoring: "generate" decodes the answer, "choice" compares log-likelihoods of the choices."""

    @property
    def folder(self) -> str:
        """The task's folder under a folder of all tasks (`--task-path ROOT`)."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of metrics (`METRICS`)."""

    @property
    def primary(self) -> str:
        """The metric that tables show, one of `metrics`."""

    @property
    def decoding(self) -> Decoding:
        """Decoding settings."""

    @property
    def finetune(self) -> FinetuneDefaults:
        """Defaults of finetuning."""

    def examples(self, split: Split, path: str | None, limit: int | None) -> list[Example]:
        """Return examples of a split in a fixed order.

        Where the order means something (records sorted by article), the task also has an attribute `ordered = True`. A
        limit then asks for all examples and draws a sample of them. Without it, a limit takes the first examples, so
        that a task that generates examples generates no more than needed.

        Args:
            split: "train" or "eval".
            path: Folder with the task's records (`task.path`); None if the user gave none.
            limit: Number of examples from the start; None returns all.
        """
        ...


TASK_MEMBERS = ("name", "kind", "folder", "metrics", "primary", "decoding", "finetune", "examples")
"""The members of `Task` in the order in which an error lists them."""
