"""The decoding loop: each forward pass gives every row its next token with the pauses after it, or granted pauses.

A row does not wait for others: while one computes a pause, the others go on. Its answer is that of a batch of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pause_megatron.inference.places import PauseRun, Places, pause_marks
from pause_megatron.inference.prefill import Prefix
from pause_megatron.inference.session import Session

Select = Callable[[Tensor, Sequence[int], Sequence[int]], list[int]]
"""Selects every row's token, from (logits [batch, vocab], number of each row's token, requests before it)."""

Push = Callable[[int, Tensor, int], bool]
"""Takes (row, its logits, its token); returns whether the row continues."""


class Row:
    """One row while it is decoded.

    Args:
        places: Pauses of the batch.
        prefix: The row before its first new token.
        used: Pauses after the prompt, M.

    Attributes:
        index: Number of tokens so far.
        granted: Pauses that were granted before the next token.
        requests: How many of them the model requested.
        pauses: (tokens before them, number) of the pauses so far.
    """

    def __init__(self, places: Places, prefix: Prefix, used: int) -> None:
        self._pauses = PauseRun(places, prefix.run(used))
        self._counted = prefix.counted
        self.index = 0
        self.granted = 0
        self.requests = 0
        self.pauses: list[tuple[int, int]] = []

    def follow(self, token_id: int) -> list[int]:
        """Return the next token and the pauses after it, to be computed together."""
        self.index += 1
        self.granted = self.requests = 0
        found = self._pauses.follow(token_id, self._counted + self.index)
        self._note(len(found) - 1)
        return found

    def grant(self, count: int) -> list[int]:
        """Return pauses before the next token."""
        self.granted += count
        self._note(count)
        return self._pauses.more(count)

    def _note(self, count: int) -> None:
        if count and self.pauses and self.pauses[-1][0] == self.index:
            self.pauses[-1] = (self.index, self.pauses[-1][1] + count)
        elif count:
            self.pauses.append((self.index, count))


class Chooser:
    """What every row does next: a token, or pauses before it.

    Args:
        places: Pauses of the batch.
        suppressed: Ids that are never emitted, the pauses among them.
        request: Id that requests a pause; None where none can be requested.
        select: Selects tokens.
    """

    def __init__(self, places: Places, suppressed: Sequence[int], request: int | None, select: Select) -> None:
        self._decoding = places.decoding
        self._suppressed = list(suppressed)
        self._request = request if places.decoding.requests else None
        self._select = select

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[int]]:
        """Return every row's token, and the pauses that it gets first; the token counts where there are none.

        Args:
            logits: Next-token logits, fp32 [batch, vocab].
            rows: The rows.
        """
        allowed = self.allowed(logits)
        grants = self._uncertain(allowed, rows)
        request, limit = self._request, self._decoding.limit
        if request is not None:
            asking = [i for i, row in enumerate(rows) if row.granted < limit and not grants[i]]
            allowed[asking, request] = logits[asking, request]
        tokens = self._select(allowed, [row.index for row in rows], [row.requests for row in rows])
        for i, row in enumerate(rows):
            if tokens[i] == request and not grants[i]:
                grants[i] = 1
                row.requests += 1
        return tokens, grants

    def allowed(self, logits: Tensor) -> Tensor:
        """Return the logits with -inf for the ids that are never emitted."""
        allowed = logits.clone()
        allowed[..., self._suppressed] = float("-inf")
        return allowed

    def _uncertain(self, allowed: Tensor, rows: Sequence[Row]) -> list[int]:
        """Pauses of every row whose distribution has too much entropy."""
        decoding = self._decoding
        if decoding.entropy is None:
            return [0] * len(rows)
        log_probabilities = allowed.log_softmax(-1).clamp(min=-1e4)
        entropies = -(log_probabilities.exp() * log_probabilities).sum(-1)
        high = (entropies > decoding.entropy).tolist()
        return [
            min(decoding.count, decoding.limit - row.granted) if above else 0
            for row, above in zip(rows, high, strict=True)
        ]


def decode(session: Session, logits: Tensor, rows: Sequence[Row], chooser: Chooser, push: Push) -> None:
    """Decode until every row has ended.

    Args:
        session: The batch after its prefill.
        logits: Logits of the first new tokens, fp32 [batch, vocab].
        rows: The rows, [batch].
        chooser: Chooses what every row does next.
        push: Called for every new token, with the logits that it was selected from.
    """
    running = set(range(len(rows)))
    while True:
        tokens, grants = chooser.choose(logits, rows)
        step: list[list[int]] = [[] for _ in rows]
        marks: list[list[bool]] = [[] for _ in rows]  # which of them are pauses
        for i in sorted(running):
            if grants[i]:
                step[i] = rows[i].grant(grants[i])
                marks[i] = [True] * len(step[i])
            elif push(i, logits[i], tokens[i]):
                step[i] = rows[i].follow(tokens[i])
                marks[i] = [False, *[True] * (len(step[i]) - 1)]
            else:
                running.remove(i)
        if not running:
            return
        logits = session.forward(step, pauses=marks)[:, -1]


def log_likelihoods(
    session: Session,
    first: Tensor,
    targets: Sequence[Sequence[int]],
    mixed: Sequence[tuple[list[int], list[int]]],
    suppressed: Sequence[int],
) -> list[tuple[float, bool]]:
    """Compute the likelihood of texts whose pauses are known, in one forward pass.

    Args:
        session: The batch after its prefill.
        first: Logits of the first tokens, fp32 [batch, vocab].
        targets: Ids of each text.
        mixed: For each text what `Places.interleave` returns.
        suppressed: Ids that take no part in the softmax.

    Returns:
        For each text its log-likelihood, in nats, and whether each token is the likeliest one.
    """
    width = max(len(ids) for ids, _ in mixed)
    logits = first[:, None]
    if width:
        marks = [pause_marks(len(ids), predicting) for ids, predicting in mixed]
        rest = session.forward([ids for ids, _ in mixed], keep=width, pauses=marks, last=True)
        logits = torch.cat([logits, rest], dim=1)
    logits[..., list(suppressed)] = float("-inf")
    found = []
    for row, ids, (_, predicting) in zip(logits.log_softmax(-1), targets, mixed, strict=True):
        index = torch.tensor([0, *(1 + slot for slot in predicting)], device=row.device)
        predicted, wanted = row[index], torch.tensor(ids, device=row.device)
        chosen = predicted.gather(1, wanted[:, None])
        found.append((float(chosen.double().sum()), bool((predicted.argmax(-1) == wanted).all())))
    return found


class Targets:
    """Texts whose likelihoods are computed token by token, since predictions decide their pauses.

    Args:
        texts: Ids of each text.
        request: Id that requests a pause where it is the likeliest; None where none can be requested.

    Attributes:
        chooser: Chooses pauses; it selects with `select`.
    """

    chooser: Chooser

    def __init__(self, texts: Sequence[Sequence[int]], request: int | None) -> None:
        self._texts = texts
        self._request = request
        self._next = [0] * len(texts)
        self._totals = [0.0] * len(texts)
        self._greedy = [True] * len(texts)

    def select(self, logits: Tensor, numbers: Sequence[int], requests: Sequence[int]) -> list[int]:
        """Return every text's own token, or a request where that is the likeliest; a `Select`."""
        given = [text[min(number, len(text) - 1)] for text, number in zip(self._texts, numbers, strict=True)]
        if self._request is None:
            return given
        likeliest = logits.argmax(-1).tolist()
        return [asked if asked == self._request else own for asked, own in zip(likeliest, given, strict=True)]

    def push(self, row: int, logits: Tensor, token_id: int) -> bool:
        """Add the log-probability of the next token; a `Push`."""
        log_probabilities = self.chooser.allowed(logits).log_softmax(-1)
        self._totals[row] += float(log_probabilities[token_id].double())
        self._greedy[row] &= int(log_probabilities.argmax()) == token_id
        self._next[row] += 1
        return self._next[row] < len(self._texts[row])

    def found(self) -> list[tuple[float, bool]]:
        """Return each text's log-likelihood, in nats, and whether each of its tokens is the likeliest one."""
        return list(zip(self._totals, self._greedy, strict=True))
