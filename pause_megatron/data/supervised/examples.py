"""Task examples as token ids, and their layout in a window: prompt, pauses, target (Goyal et al., section 3.2).

Notation (Goyal et al., section 3.2):

    P     tokens of the prompt, with what the tokenizer puts before it.
    M     pauses of an example: fixed, or drawn for each example and epoch from a range.
    T     tokens of the target; the last of them is the end-of-document token (EOD).
    M_a   pauses within the target (`answers`): read and never predicted.
    N     data.sequence_length. An example takes P + M + M_a + T - 1 input tokens: the last target is predicted, never
          read.

The prompt and its pauses form the prefix. The first target is predicted from the last token of the prefix. Where pauses
are appended, that token is the last pause.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np

from pause_megatron.data.supervised.answers import NO_GAPS, AnswerPauses
from pause_megatron.data.tokenizer.continuation import Continuations
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.data.windows.pause import LOCATIONS, Window, add_pauses, inject
from pause_megatron.errors import ConfigError, DataError

_BLOCK = 4096  # examples

HINT_PLACES = ("pauses", "heads")
"""What predicts the hints of an example: its first pauses, or auxiliary heads where the answer is predicted."""

PREFIX_ATTENTIONS = ("causal", "bidirectional")
"""Attention within a prefix: causal, or prompt and pauses see each other in both directions (a prefix-LM)."""


@dataclass(frozen=True)
class Prompting:
    """The use of pauses in prompts, for any number of them: in finetuning, generation and evaluation alike.

    Attributes:
        location: One of LOCATIONS: pauses after the prompt, or before it.
        filler: Text of one ordinary token that takes the place of the pause, a control. None: the pause itself.
        prefix_attention: One of PREFIX_ATTENTIONS.

    Raises:
        ConfigError: A location or an attention that does not exist.
    """

    location: str = "append"
    filler: str | None = None
    prefix_attention: str = "causal"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("location", self.location, LOCATIONS),
            ("prefix_attention", self.prefix_attention, PREFIX_ATTENTIONS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


class Example(Protocol):
    """A training example of a task: `target` follows `prompt`. The blank between them belongs to the target.

    Attributes:
        id: The name of the example in messages.
        prompt: The text before the pauses. It carries no loss.
        target: The text after the pauses. It carries the loss.
    """

    @property
    def id(self) -> str:
        """Name of the example in messages."""
        ...

    @property
    def prompt(self) -> str:
        """Text before the pauses."""
        ...

    @property
    def target(self) -> str:
        """Text after the pauses."""
        ...


class Hinted(Protocol):
    """An example with hints.

    Attributes:
        hints: Targets for pauses or auxiliary heads, in order; each the text of one token.
    """

    @property
    def hints(self) -> tuple[str, ...]:
        """Targets for pauses or auxiliary heads, in order; each the text of one token."""
        ...


class EncodedExample(NamedTuple):
    """An example as token ids.

    Attributes:
        id: The name of the example in messages.
        prompt: Token ids, int32 [P].
        target: Token ids, int32 [T]. The last one is EOD.
        hints: Token ids of the hints, int32 [hints].
        values: Values of the answer's tokens without EOD, fp32 [T - 1], for policies; None without `task.scores`.
    """

    id: str
    prompt: np.ndarray
    target: np.ndarray
    hints: np.ndarray = np.zeros(0, dtype=np.int32)
    values: np.ndarray | None = None


def continuations(tokenizer: Tokenizer) -> Continuations:
    """Return the encoder of continuations that belongs to a native tokenizer."""
    return Continuations(tokenizer.encode, lambda ids: tokenizer.decode(ids, pause_text=""))


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer) -> list[EncodedExample]:
    """Encode examples to the token ids that inference with the exported tokenizer has.

    Args:
        examples: The examples of a task, at least one.
        tokenizer: The tokenizer of the model that is trained.

    Returns:
        The encoded examples, in the same order.

    Raises:
        DataError: There are no examples, or one of them cannot be encoded. The message names it.
    """
    if not examples:
        raise DataError("examples: expected at least one, got none")
    as_continuation = cache(continuations(tokenizer).encode)
    # In blocks: a tokenizer keeps much more than the ids of a batch until the batch is done.
    blocks = (examples[start : start + _BLOCK] for start in range(0, len(examples), _BLOCK))
    prompts = (ids for block in blocks for ids in tokenizer.encode_batch([example.prompt for example in block]))
    encoded = []
    for example, prompt in zip(examples, prompts, strict=True):
        try:
            target = [*as_continuation(example.target), tokenizer.eod]
        except DataError as error:
            raise DataError(f"example {example.id}: target: {error}") from None
        ids = (np.array(ids, dtype=np.int32) for ids in ([*tokenizer.leading, *prompt], target))
        encoded.append(EncodedExample(example.id, *ids))
    return encoded


def with_hints(
    encoded: Iterable[EncodedExample], examples: Iterable[Hinted], tokenizer: Tokenizer
) -> list[EncodedExample]:
    """Return encoded examples with the token ids of their hints.

    Args:
        encoded: What `encode_examples` returned.
        examples: The same examples as text.
        tokenizer: The tokenizer of the model that is trained.

    Raises:
        DataError: A hint is not one token. The message names the example and the hint.
    """
    one_token = continuations(tokenizer).one_token
    known: dict[str, int] = {}
    arrays: dict[tuple[str, ...], np.ndarray] = {}  # examples with the same hints share them
    result = []
    for ids, example in zip(encoded, examples, strict=True):
        if example.hints not in arrays:
            for number, hint in enumerate(example.hints, start=1):
                if hint not in known:
                    try:
                        known[hint] = one_token(hint)
                    except DataError as error:
                        raise DataError(f"example {ids.id}: hint {number}: {error}") from None
            arrays[example.hints] = np.array([known[hint] for hint in example.hints], dtype=np.int32)
        result.append(ids._replace(hints=arrays[example.hints]))
    return result


@dataclass(frozen=True)
class Arrangement:
    """The layout of examples in windows.

    Attributes:
        sequence_length: N, input tokens of a window.
        pauses: The numbers of pauses that M is drawn from, range(low, high + 1).
        pause_ids: The K pause ids, used in turn; or the one id of a filler.
        location: One of LOCATIONS.
        prefix_attention: One of PREFIX_ATTENTIONS.
        batching: "packed" (several examples a window, with intra-document masking) or "padded" (one example a window).
        leading: Number of tokens at the beginning of a prompt (a BOS) that are never truncated. Prepended pauses stand
            after them.
        hints: One of HINT_PLACES; None: hints have no loss.
        shared_positions: Whether a pause (or filler) has the position of the text token before it.
        answers: Pauses within the targets; None: none there.
    """

    sequence_length: int
    pauses: range
    pause_ids: range
    location: str = "append"
    prefix_attention: str = "causal"
    batching: str = "packed"
    leading: int = 0
    hints: str | None = None
    shared_positions: bool = False
    answers: AnswerPauses | None = None

    def check(self, example: EncodedExample) -> None:
        """Check that an example fits into a window with the largest and the smallest number of pauses.

        Args:
            example: The encoded example.

        Raises:
            DataError: Its target and pauses leave no room for the last token of the prompt, its prefix is empty, or
                its hints are missing or more than the pauses before the last one.
        """
        self._check_hints(example)
        within = self.answers.most(example.target.size - 1) if self.answers else 0
        self.check_room(example, within or 0)  # a policy of the user's: its draws are checked
        if not example.prompt.size and not self.pauses[0]:
            raise DataError(
                f"example {example.id}: expected a prompt, or pauses that predict the target, got an empty prompt "
                "without pauses"
            )

    def check_room(self, example: EncodedExample, within: int) -> None:
        """Check that an example fits into a window with the largest M.

        Args:
            example: The encoded example.
            within: M_a, pauses within its target.

        Raises:
            DataError: Its target and pauses leave no room for the last token of the prompt.
        """
        most, targets = self.pauses[-1] + within, example.target.size
        kept = min(example.prompt.size, max(self.leading, 1))
        if kept + most + targets > self.sequence_length + 1:
            there = "" if self.answers is None else f" ({within} in the answer)"
            room = max(self.sequence_length + 1 - most - kept, 0)
            raise DataError(
                f"example {example.id}: expected at most {room} target tokens beside {most} pauses{there} and {kept} "
                f"tokens of the prompt in a window of data.sequence_length={self.sequence_length}, got {targets}. "
                f"Pauses and targets are never truncated: raise data.sequence_length, or lower finetune.pauses"
                f"{'' if self.answers is None else f' or {self.answers.decided_by}'}"
            )

    def _check_hints(self, example: EncodedExample) -> None:
        if self.hints is None:
            return
        count, fewest = example.hints.size, self.pauses[0]
        if not count:
            raise DataError(
                f"example {example.id}: expected hints of the task, for finetune.pause_targets or "
                "finetune.auxiliary_heads, got none"
            )
        if self.hints == "pauses" and fewest < count + 1:
            raise DataError(
                f"example {example.id}: expected at least {count + 1} finetune.pauses for its {count} hints "
                f"(finetune.pause_targets: the last pause predicts the answer), got {fewest}"
            )

    def hint_positions(self, example: EncodedExample, count: int, prefix_size: int) -> np.ndarray:
        """Return the position at which each hint is predicted, int64 [hints]; none where hints have no loss.

        Args:
            example: The encoded example.
            count: M, its pauses.
            prefix_size: Tokens of its prefix, as `arrange` returns them.
        """
        size = example.hints.size
        if self.hints == "pauses":
            return prefix_size - count + np.arange(size)
        return np.full(size if self.hints == "heads" else 0, prefix_size - 1)

    def prompt_tokens(self, example: EncodedExample, count: int, gaps: np.ndarray = NO_GAPS) -> int:
        """Return how many tokens of the prompt are kept beside `count` pauses, and those at `gaps` of the answer."""
        return min(example.prompt.size, self.sequence_length + 1 - count - gaps.size - example.target.size)

    def length(self, example: EncodedExample, count: int, gaps: np.ndarray = NO_GAPS) -> int:
        """Return how many input tokens an example takes with `count` pauses, and those at `gaps` of the answer."""
        return self.prompt_tokens(example, count, gaps) + count + gaps.size + example.target.size - 1

    def is_text(self, example: EncodedExample, count: int, prefix_size: int, gaps: np.ndarray = NO_GAPS) -> np.ndarray:
        """Return which tokens of an arranged example are neither pauses nor fillers in their place, bool [length + 1].

        Args:
            example: The encoded example.
            count: M, its pauses.
            prefix_size: Tokens of its prefix, as `arrange` returns them.
            gaps: Gaps of its answer.
        """
        first = prefix_size - count if self.location == "append" else self.leading
        prefix = np.ones(prefix_size, dtype=bool)
        prefix[first : first + count] = False
        return np.concatenate([prefix, self.answer(example, gaps).is_text])

    def arrange(self, example: EncodedExample, count: int, gaps: np.ndarray = NO_GAPS) -> tuple[np.ndarray, int]:
        """Arrange an example with its pauses. A prompt that is too long is truncated on the left.

        Args:
            example: The encoded example.
            count: M, its pauses.
            gaps: Gaps of its answer, as `AnswerPauses.gaps` returns them.

        Returns:
            Prefix and target, int64 [length + 1], and the number of tokens of the prefix.
        """
        cut = example.prompt.size - self.prompt_tokens(example, count, gaps)
        prompt = np.delete(example.prompt, slice(self.leading, self.leading + cut)).astype(np.int64)
        prefix = add_pauses(prompt, count, self.pause_ids, location=self.location, kept=self.leading)
        return np.concatenate([prefix, self.answer(example, gaps).tokens]), prefix.size

    def answer(self, example: EncodedExample, gaps: np.ndarray = NO_GAPS) -> Window:
        """Return the target of an example with the pauses within it, and their places.

        Args:
            example: The encoded example.
            gaps: Gaps of its answer.
        """
        return inject(example.target, gaps, self.pause_ids)
