"""What generation and scoring give back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Completion:
    """One prompt's answer.

    Attributes:
        text: what follows the prompt; prompt + text is the whole.
        ids: its tokens, without the end-of-sequence token; of a stop text, those that began it are among them.
        finish: "eos", "stop" or "length".
        prompt_tokens: tokens of the prompt, a BOS included, pauses not.
        pauses: pauses (or fillers) that the answer was read behind.
        logits: fp32 [new tokens, vocab] on the CPU, before suppression and sampling; None unless asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish: str
    prompt_tokens: int
    pauses: int
    logits: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Cost:
    """What a batch cost.

    Attributes:
        forward_passes: calls of the model.
        prefill_passes: those before the first new token: 1, unless pauses were adaptive.
        positions: token positions computed, pauses that were not used included, padding not.
        prefill_seconds: until the first new token could be chosen.
        decode_seconds: from there to the end.
    """

    forward_passes: int
    prefill_passes: int
    positions: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Generation:
    """A batch: its completions, in the order of the prompts, and its cost."""

    completions: tuple[Completion, ...]
    cost: Cost


@dataclass(frozen=True)
class Score:
    """How likely a given continuation is: the sum of its tokens' log-probabilities (nats), their number, M."""

    log_likelihood: float
    tokens: int
    pauses: int
