"""Prefill: prompts and pauses to the logits of every row's first new token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pause_megatron.data.supervised.examples import Prompting
from pause_megatron.errors import ConfigError
from pause_megatron.inference.adaptive import PausePolicy
from pause_megatron.inference.places import Places
from pause_megatron.inference.prompts import PromptEncoder
from pause_megatron.inference.session import Session


@dataclass(frozen=True)
class Prefix:
    """One row before its first new token.

    Attributes:
        ids: Prompt and all pauses that it may get, `policy.limit` of them.
        prompt_tokens: Number of tokens of the prompt alone.
        policy: Decides how many of the pauses are used.
        pauses: Places of the pauses (or fillers) in `ids`.
        inside: How many of them are within the prompt, besides those of the policy.
        counted: Tokens of the prompt that `DecodingPauses.every` counts.
        own: Ids of the model's pauses.
    """

    ids: list[int]
    prompt_tokens: int
    policy: PausePolicy
    pauses: frozenset[int]
    inside: int
    counted: int
    own: range

    @property
    def adaptive(self) -> bool:
        """Whether the number of pauses depends on the model's output."""
        return self.policy.first < self.policy.limit

    def positions(self, without: range | None) -> int:
        """Return how many positions the row takes.

        Args:
            without: Ids of pauses that use up no position, as do fillers in their place; None: all tokens use one.
        """
        if without is None:
            return len(self.ids)
        text = (token not in without and place not in self.pauses for place, token in enumerate(self.ids))
        return sum(text)

    def run(self, used: int) -> int:
        """Return the number of pauses directly before the first new token.

        Args:
            used: Pauses of the policy.
        """
        end = len(self.ids) - self.policy.limit + used
        back = range(end - 1, -1, -1)
        found = (place for place in back if place not in self.pauses and self.ids[place] not in self.own)
        return end - 1 - next(found, -1)

    def check(
        self,
        config: Any,
        name: str,
        new_tokens: int,
        prompting: Prompting,
        answer_pauses: int,
        without_positions: range | None = None,
        *,
        level: bool = True,
    ) -> None:
        """Check that the row fits the model and that its options fit each other.

        Args:
            config: The model's `PretrainedConfig`.
            name: Names the row in messages.
            new_tokens: Maximum number of tokens after the prefix.
            prompting: Location and attention of the pauses.
            answer_pauses: Maximum number of pauses among them.
            without_positions: As `positions` takes them.
            level: Whether no other row of the batch gets fewer or more tokens in a pass of decoding.

        Raises:
            ConfigError: Too many positions, or adaptive pauses where pauses cannot be added one after the other.
        """
        total = len(self.ids) + new_tokens + answer_pauses
        taken = total if without_positions is None else self.positions(without_positions) + new_tokens
        available = getattr(config, "max_position_embeddings", None)
        if available is not None and taken > available:
            uses = without_positions is None
            inside = f" + {self.inside} pauses within it" if self.inside and uses else ""
            within = f" + {answer_pauses} pauses among them" if answer_pauses and uses else ""
            pauses = f" + {self.policy.limit} pauses" if uses else ""
            raise ConfigError(
                f"{name}: {self.prompt_tokens} prompt tokens{inside}{pauses} + {new_tokens} new tokens{within} = "
                f"{taken} positions, but the model has {available} (max_position_embeddings); shorten the prompt, or "
                f"lower pauses or max_new_tokens"
            )
        causal = prompting.prefix_attention == "causal"
        if self.adaptive and prompting.location != "append":
            raise ConfigError(
                f"location: expected append for adaptive pauses, got {prompting.location}: pauses before the prompt "
                "cannot be added later"
            )
        if self.adaptive and not causal:
            raise ConfigError(
                "prefix_attention: expected causal for adaptive pauses, got bidirectional: there, every further pause "
                "changes the keys and values of all positions before it"
            )
        window = getattr(config, "sliding_window", None)
        if window is not None and total > window and (self.adaptive or not causal):
            raise ConfigError(
                f"{name}: {total} tokens reach past the model's sliding window of {window}, where only a fixed "
                f"number of pauses and a causal prefix are supported"
            )
        if window is not None and total > window and answer_pauses and not level:
            raise ConfigError(
                f"{name}: {total} positions reach past the model's sliding window of {window}, where pauses within "
                f"answers are supported for one prompt at a time (a batch of 1)"
            )


def build_prefix(
    encoder: PromptEncoder,
    prompt: str | Sequence[int],
    policy: PausePolicy,
    prompting: Prompting,
    name: str,
    places: Places | None = None,
) -> Prefix:
    """Encode a prompt and add its pauses.

    Args:
        encoder: Encodes the prompt.
        prompt: Text or token ids.
        policy: Decides the number of pauses.
        prompting: Location and filler of the pauses.
        name: Names the row in messages.
        places: Places of further pauses, which may be within the prompt.

    Raises:
        ConfigError: Pauses for a model that has none, a policy that contradicts itself, a filler of several tokens, or
            an empty prefix.
        DataError: A prompt that cannot be encoded.
    """
    if not 0 <= policy.first <= policy.limit or policy.block < 1:
        raise ConfigError(
            f"{name}: pauses: expected 0 <= first <= limit and block >= 1, got first {policy.first}, limit "
            f"{policy.limit}, block {policy.block}"
        )
    filler = (encoder.filler_id(prompting.filler),) if prompting.filler else ()
    if policy.limit and not filler and not encoder.pause.ids:
        raise ConfigError(
            "the model has no pause token: its config.json has no pause ids, and its tokenizer has no special token "
            '<pause>. Use pauses=0, or a filler such as "."'
        )
    prompt_ids = encoder.encode(prompt)
    inside, counted = ([], 0) if places is None else places.in_prompt(prompt_ids)
    ids, places_of = encoder.paused(prompt_ids, policy.limit, prompting.location, filler, inside)
    if len(ids) - policy.limit + policy.first == 0:
        raise ConfigError(f"{name}: expected a non-empty prompt, a pause or a BOS, got none of them")
    return Prefix(ids, len(prompt_ids), policy, frozenset(places_of), len(inside), counted, encoder.pause.ids)


def deduplicate(prefixes: Sequence[Prefix]) -> tuple[list[Prefix], list[int]]:
    """Drop rows that equal an earlier one. Adaptive rows are all kept.

    Args:
        prefixes: The rows, [batch].

    Returns:
        The distinct rows, and for each row its index among them, [batch].
    """
    index_of: dict[object, int] = {}
    distinct: list[Prefix] = []
    rows = []
    for index, prefix in enumerate(prefixes):
        key = index if prefix.adaptive else (prefix.policy.limit, prefix.pauses, *prefix.ids)
        row = index_of.setdefault(key, len(distinct))
        if row == len(distinct):
            distinct.append(prefix)
        rows.append(row)
    return distinct, rows


def prefill(
    session: Session, prefixes: Sequence[Prefix], pause_ids: range, *, bidirectional: bool
) -> tuple[Tensor, list[int]]:
    """Compute prompts and pauses in one forward pass, and in further ones while a policy asks for more pauses.

    Args:
        session: A session without forward passes so far.
        prefixes: The rows, [batch].
        pause_ids: Ids with probability 0 in what the policies see.
        bidirectional: Whether prompt and pauses attend to each other in both directions.

    Returns:
        Logits after each row's last pause, fp32 [batch, vocab], and the number of pauses of each row, [batch].
    """
    rows = [_RowPrefill(prefix) for prefix in prefixes]
    taken = [row.take() for row in rows]
    logits = _forward(session, taken, max(row.keep for row in rows), bidirectional=bidirectional)
    while True:
        for i, row in enumerate(rows):
            if row.result is None:
                session.invalidate(i, row.observe(logits[i], pause_ids))
        results = [row.result for row in rows if row.result is not None]
        if len(results) == len(rows):
            return torch.stack(results), [row.used for row in rows]
        taken = [row.take() for row in rows]
        logits = _forward(session, taken, max(max(row.keep for row in rows), 1))


def _forward(
    session: Session, taken: Sequence[tuple[list[int], list[bool]]], keep: int, *, bidirectional: bool = False
) -> Tensor:
    tokens, pauses = [ids for ids, _ in taken], [marks for _, marks in taken]
    return session.forward(tokens, keep, bidirectional=bidirectional, pauses=pauses)


class _RowPrefill:
    """Progress of one row's prefill.

    Attributes:
        keep: Slots at the right end whose logits the next pass must return.
        used: Number of pauses; final once there is a result.
        result: Logits of the first new token, fp32 [vocab]; None until they are computed.
    """

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = prefix
        self._policy = prefix.policy
        self._computed = 0
        self._log_probabilities: list[Tensor] = []
        self._logits: list[Tensor] = []
        self.result: Tensor | None = None
        self.used = prefix.policy.first
        self.keep = 1 + self._block(prefix.policy.first)

    def take(self) -> tuple[list[int], list[bool]]:
        """Return the tokens of the next pass, first the prompt and its pauses, then block by block; and their marks."""
        if self.result is not None:
            return [], []
        start, pauses = self._computed, self.used
        self.used = pauses + self._block(pauses)
        self._computed = len(self._prefix.ids) - self._policy.limit + self.used
        places = range(start, self._computed)
        return self._prefix.ids[start : self._computed], [place in self._prefix.pauses for place in places]

    def observe(self, logits: Tensor, pause_ids: range) -> int:
        """Give the policy a pass's logits [slots, vocab]. Return how many of the computed pauses are not used."""
        own = logits[len(logits) - self.keep :]
        self.keep = self._block(self.used)
        if not self._prefix.adaptive:
            self.result = own[-1]
            return 0
        self._logits += own
        suppressed = own.clone()
        suppressed[:, list(pause_ids)] = float("-inf")
        self._log_probabilities.append(suppressed.log_softmax(-1))
        index = self._policy.stop(torch.cat(self._log_probabilities))
        if index is None and self.used == self._policy.limit:
            index = len(self._logits) - 1
        if index is None:
            return 0
        if not 0 <= index < len(self._logits):
            raise ConfigError(f"pause policy: expected an index from 0 to {len(self._logits) - 1}, got {index}")
        surplus = len(self._logits) - 1 - index
        self.result, self.keep = self._logits[index], 0
        self.used -= surplus
        return surplus

    def _block(self, pauses: int) -> int:
        return min(self._policy.block, self._policy.limit - pauses)
