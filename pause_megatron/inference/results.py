"""Results of generation and scoring: answers, log-likelihoods, and the cost of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """One prompt's answer.

    Attributes:
        text: Text that follows the prompt; prompt + text is the whole.
        ids: Token ids of the answer without the end-of-sequence token. Tokens that began a stop text are included.
        finish: "eos", "stop" or "length".
        prompt_tokens: Tokens of the prompt, a BOS included, pauses not.
        pauses: Pauses (or fillers) before the answer.
        logits: Logits before suppression and sampling, fp32 [new tokens, vocab], on the CPU; None unless requested.
        answer_pauses: Pauses within the answer: (tokens of the answer before them, number), for each place. One with
            0 tokens before it was granted after the prompt's own pauses.
        prompt_pauses: Pauses within the prompt.
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    prompt_tokens: int
    pauses: int
    logits: Tensor | None = field(default=None, repr=False, compare=False)
    answer_pauses: tuple[tuple[int, int], ...] = ()
    prompt_pauses: int = 0

    @property
    def pauses_in_answer(self) -> int:
        """Number of pauses within the answer."""
        return sum(count for _, count in self.answer_pauses)


@dataclass(frozen=True)
class Cost:
    """Compute and time of a batch.

    Attributes:
        forward_passes: Forward passes of the model.
        prefill_passes: Forward passes before the first new token: 1, unless pauses are adaptive.
        positions: Token positions computed, unused pauses included, padding not.
        prefill_seconds: Time until the first new token could be selected.
        decode_seconds: Time from there to the end.
    """

    forward_passes: int = 0
    prefill_passes: int = 0
    positions: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class Generation:
    """A batch of answers and its cost.

    Attributes:
        completions: One for each prompt, in the order of the prompts.
        cost: Cost of the batch.
    """

    completions: tuple[Completion, ...]
    cost: Cost


@dataclass(frozen=True)
class Score:
    """Likelihood of a given continuation.

    Attributes:
        log_likelihood: Sum of its tokens' log-probabilities, in nats.
        tokens: Number of its tokens.
        pauses: Pauses before it, M.
        answer_pauses: Pauses within it, as in `Completion`.
        prompt_pauses: Pauses within the prompt.
        greedy: Whether each of its tokens is the likeliest one.
    """

    log_likelihood: float
    tokens: int
    pauses: int
    answer_pauses: tuple[tuple[int, int], ...] = ()
    prompt_pauses: int = 0
    greedy: bool = field(default=False, compare=False)
