"""Task examples as token ids, and how one lies in a window: prefix, pauses, target (Goyal et al., section 3.2).

Notation (method.md, section 2):

    P     tokens of the prompt, with what the tokenizer puts before it.
    M     pauses of an example: fixed, or drawn for each example and epoch from a range.
    T     tokens of the target; the end-of-document token is the last of them.
    N     data.sequence_length. An example takes P + M + T - 1 input tokens: the last target is predicted, never read.

The prompt and the pauses are the prefix; the first target is predicted from the prefix's last token, the last pause
where pauses are appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pause_megatron.data.tokenizer.continuation import Continuations
from pause_megatron.data.tokenizer.tokenizer import Tokenizer
from pause_megatron.data.windows.pause import add_pauses
from pause_megatron.errors import DataError


class Example(Protocol):
    """What is learned from a task's record: `target` behind `prompt`. The blank between them belongs to the target."""

    id: str
    prompt: str
    target: str


class EncodedExample(NamedTuple):
    """An example as token ids.

    Attributes:
        id: Names it in messages.
        prompt: int32 [P].
        target: int32 [T], ending with the end of a document.
    """

    id: str
    prompt: np.ndarray
    target: np.ndarray


def continuations(tokenizer: Tokenizer) -> Continuations:
    """Continuations in a native tokenizer."""
    return Continuations(tokenizer.encode, lambda ids: tokenizer.decode(ids, pause_text=""))


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer) -> list[EncodedExample]:
    """Ids of examples, as inference with the exported tokenizer has them.

    Raises:
        DataError: no examples, or one that cannot be encoded; it is named.
    """
    if not examples:
        raise DataError("expected examples to train on, there are none")
    as_continuation = continuations(tokenizer).encode
    prompts = tokenizer.encode_batch([example.prompt for example in examples])
    encoded = []
    for example, prompt in zip(examples, prompts, strict=True):
        try:
            target = [*as_continuation(example.target), tokenizer.eod]
        except DataError as error:
            raise DataError(f"example {example.id}: target: {error}") from None
        ids = (np.array(ids, dtype=np.int32) for ids in ([*tokenizer.leading, *prompt], target))
        encoded.append(EncodedExample(example.id, *ids))
    return encoded


@dataclass(frozen=True)
class Arrangement:
    """How an example lies in a window.

    Attributes:
        sequence_length: N.
        pauses: The numbers of pauses that M is drawn from, range(low, high + 1).
        pause_ids: The K pause ids, used in turn; a filler's id where one is used.
        location: "append" or "prepend".
        prefix_attention: "causal" or "bidirectional" (prompt and pauses see each other).
        batching: "packed" (several examples in a window, which do not see each other) or "padded" (one).
        leading: Tokens at the beginning of a prompt that are never cut off, and that prepended pauses stand behind.
    """

    sequence_length: int
    pauses: range
    pause_ids: range
    location: str = "append"
    prefix_attention: str = "causal"
    batching: str = "packed"
    leading: int = 0

    def check(self, example: EncodedExample) -> None:
        """Check that an example fits whatever is drawn.

        Raises:
            DataError: its target and pauses leave no room for the prompt's last token, or it has no prefix at all.
        """
        most, targets = self.pauses[-1], example.target.size
        kept = min(example.prompt.size, max(self.leading, 1))
        if kept + most + targets > self.sequence_length + 1:
            raise DataError(
                f"example {example.id}: {targets} target tokens and {most} pauses do not fit into a window of "
                f"data.sequence_length={self.sequence_length} tokens beside {kept} of the prompt (pauses and targets "
                f"are never cut); expected at most {self.sequence_length + 1 - most - kept} target tokens. Raise "
                "data.sequence_length, or lower finetune.pauses"
            )
        if not example.prompt.size and not self.pauses[0]:
            raise DataError(f"example {example.id}: an empty prompt without pauses, so nothing predicts the target")

    def prompt_tokens(self, example: EncodedExample, count: int) -> int:
        """Tokens of the prompt that are kept with M = count."""
        return min(example.prompt.size, self.sequence_length + 1 - count - example.target.size)

    def length(self, example: EncodedExample, count: int) -> int:
        """Input tokens that the example takes with M = count."""
        return self.prompt_tokens(example, count) + count + example.target.size - 1

    def lay(self, example: EncodedExample, count: int) -> tuple[np.ndarray, int]:
        """An example with M = count, its prompt cut on the left (behind the leading tokens) where it is too long.

        Returns:
            int64 [length + 1] prefix and target, and the number of tokens of the prefix.
        """
        cut = example.prompt.size - self.prompt_tokens(example, count)
        prompt = np.delete(example.prompt, slice(self.leading, self.leading + cut)).astype(np.int64)
        prefix = add_pauses(prompt, count, self.pause_ids, location=self.location, kept=self.leading)
        return np.concatenate([prefix, example.target]), prefix.size
