"""From prompts and pause policies to the logits of every row's first new token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pause_megatron.errors import ConfigError
from pause_megatron.inference.adaptive import PausePolicy
from pause_megatron.inference.prompts import PromptEncoder
from pause_megatron.inference.session import Session


@dataclass(frozen=True)
class Prefix:
    """One row before its first new token.

    Attributes:
        ids: prompt and all pauses it may get, `policy.limit` of them.
        prompt_tokens: tokens of the prompt alone.
        policy: decides how many of the pauses are used.
    """

    ids: list[int]
    prompt_tokens: int
    policy: PausePolicy

    @property
    def adaptive(self) -> bool:
        """Whether anything is left to decide."""
        return self.policy.first < self.policy.limit

    def check(self, config: Any, name: str, new_tokens: int, location: str, attention: str) -> None:
        """Check that the row fits the model and that its options fit each other.

        Raises:
            ConfigError: too many positions, or adaptive pauses where pauses cannot be added one after the other.
        """
        total = len(self.ids) + new_tokens
        available = getattr(config, "max_position_embeddings", None)
        if available is not None and total > available:
            raise ConfigError(
                f"{name}: {self.prompt_tokens} prompt tokens + {self.policy.limit} pauses + {new_tokens} new tokens = "
                f"{total} positions, but the model has {available} (max_position_embeddings); shorten the prompt, or "
                f"lower pauses or max_new_tokens"
            )
        if self.adaptive and location != "append":
            raise ConfigError("adaptive pauses need location=append: pauses before the prompt cannot be added later")
        if self.adaptive and attention != "causal":
            raise ConfigError(
                "adaptive pauses need prefix_attention=causal: in a bidirectional prefix every further pause changes "
                "all that was computed before"
            )
        window = getattr(config, "sliding_window", None)
        if window is not None and total > window and (self.adaptive or attention != "causal"):
            raise ConfigError(
                f"{name}: {total} positions reach past the model's sliding window of {window}, where only a fixed "
                f"number of pauses and a causal prefix are supported"
            )


def prepare(
    encoder: PromptEncoder,
    prompt: str | Sequence[int],
    policy: PausePolicy,
    location: str,
    filler: Sequence[int],
    name: str,
) -> Prefix:
    """A row from a prompt.

    Raises:
        ConfigError: pauses for a model that has none, a policy that contradicts itself, or nothing to read.
    """
    if not 0 <= policy.first <= policy.limit or policy.block < 1:
        raise ConfigError(
            f"{name}: pauses: expected 0 <= first <= limit and block >= 1, came first {policy.first}, limit "
            f"{policy.limit}, block {policy.block}"
        )
    if policy.limit and not filler and not encoder.pause.ids:
        raise ConfigError(
            "the model has no pause token: neither does its config.json name pause ids nor has its tokenizer a special "
            'token <pause>. Use pauses=0, or a filler such as "."'
        )
    ids = encoder.encode(prompt)
    whole = encoder.with_pauses(ids, policy.limit, location, filler)
    if len(whole) - policy.limit + policy.first == 0:
        raise ConfigError(f"{name}: it is empty, and there is no pause or BOS either that an answer could be read from")
    return Prefix(whole, len(ids), policy)


def distinct(prefixes: Sequence[Prefix]) -> tuple[list[Prefix], list[int]]:
    """Rows without those that are the same as an earlier one. Of adaptive rows each is its own.

    Returns:
        the rows that are left; and which of them each row is, [rows].
    """
    found: dict[object, int] = {}
    alone: list[Prefix] = []
    rows = []
    for index, prefix in enumerate(prefixes):
        row = found.setdefault(index if prefix.adaptive else (prefix.policy.limit, *prefix.ids), len(alone))
        if row == len(alone):
            alone.append(prefix)
        rows.append(row)
    return alone, rows


def prefill(
    session: Session, prefixes: Sequence[Prefix], pause_ids: range, *, bidirectional: bool
) -> tuple[Tensor, list[int]]:
    """Compute prompts and pauses: one forward pass, and further ones only for policies that are not yet content.

    Args:
        session: an unused one.
        prefixes: the rows, [rows].
        pause_ids: ids that get probability 0 in what policies see.

    Returns:
        fp32 [rows, vocab], the logits behind each row's last pause; and the pauses that each row uses, [rows].
    """
    rows = [_Row(prefix) for prefix in prefixes]
    logits = session.forward([row.take() for row in rows], max(row.kept for row in rows), bidirectional=bidirectional)
    while True:
        for i, row in enumerate(rows):
            if row.result is None:
                session.take_back(i, row.look(logits[i], pause_ids))
        if all(row.result is not None for row in rows):
            return torch.stack([row.result for row in rows]), [row.used for row in rows]
        logits = session.forward([row.take() for row in rows], max(max(row.kept for row in rows), 1))


class _Row:
    """How far one row is.

    Attributes:
        kept: slots at the right end whose logits are wanted of the coming pass.
        used: pauses, final once there is a result.
        result: fp32 [vocab], the logits the answer begins with; None: not yet.
    """

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = prefix
        self._policy = prefix.policy
        self._done = 0
        self._seen: list[Tensor] = []
        self._logits: list[Tensor] = []
        self.result: Tensor | None = None
        self.used = prefix.policy.first
        self.kept = 1 + self._block(prefix.policy.first)

    def take(self) -> list[int]:
        """The tokens of the next pass: at first the prompt and its pauses, then block by block; none when done."""
        if self.result is not None:
            return []
        done, pauses = self._done, self.used
        block = self._block(pauses)
        self.used = pauses + block
        self._done = len(self._prefix.ids) - self._policy.limit + self.used
        return self._prefix.ids[done : self._done]

    def look(self, logits: Tensor, pause_ids: range) -> int:
        """Let the policy see a pass's logits, [slots, vocab]. Returns how many of its pauses are to be taken back."""
        mine = logits[len(logits) - self.kept :]
        self.kept = self._block(self.used)
        if not self._prefix.adaptive:
            self.result = mine[-1]
            return 0
        self._logits += mine
        shown = mine.clone()
        shown[:, list(pause_ids)] = float("-inf")
        self._seen.append(shown.log_softmax(-1))
        index = self._policy.stop(torch.cat(self._seen))
        if index is None and self.used == self._policy.limit:
            index = len(self._logits) - 1
        if index is None:
            return 0
        if not 0 <= index < len(self._logits):
            raise ConfigError(f"pause policy: expected an index from 0 to {len(self._logits) - 1}, came {index}")
        surplus = len(self._logits) - 1 - index
        self.result, self.kept = self._logits[index], 0
        self.used -= surplus
        return surplus

    def _block(self, pauses: int) -> int:
        return min(self._policy.block, self._policy.limit - pauses)
