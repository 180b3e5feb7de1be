"""Generation and scoring with pauses: one prefill of the prompt and its M pauses, then decoding with a KV cache.

Goyal et al., "Think before you speak", ICLR 2024, section 3.3: the pauses are appended to the
prompt in the same forward pass, every output before the last pause is ignored, the answer's first token is predicted
from the last pause, and `<pause>` itself is never emitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pause_megatron.data.supervised.examples import Prompting
from pause_megatron.errors import ConfigError
from pause_megatron.inference.adaptive import FixedPauses, PausePolicy
from pause_megatron.inference.answer import Answer
from pause_megatron.inference.earlier_keywords import accept_earlier_keywords
from pause_megatron.inference.limits import DEFAULT_LIMITS, Limits
from pause_megatron.inference.prefill import Prefix, build_prefix, deduplicate, prefill
from pause_megatron.inference.prompts import PauseInfo, PromptEncoder
from pause_megatron.inference.results import Completion, Cost, Generation, Score
from pause_megatron.inference.sampling import GREEDY, Sampling
from pause_megatron.inference.session import Session

Prompt = str | Sequence[int]
Pauses = int | PausePolicy | Sequence[int | PausePolicy] | None


class PauseGenerator:
    """Generator and scorer with pauses for causal language models of the Llama family (Llama, Mistral, Qwen2, ...).

    Args:
        model: A transformers model; it is put into eval mode.
        tokenizer: Its fast tokenizer.
        pause: The model's pauses; None to read them from its configuration and its tokenizer.

    Raises:
        DataError: The configuration's "pause" entry does not fit model or tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, pause: PauseInfo | None = None) -> None:
        self.model = model.eval()
        self.pause = PauseInfo.of(model.config, tokenizer) if pause is None else pause
        self.encoder = PromptEncoder(tokenizer, self.pause)
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos: tuple[int, ...] = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)

    @property
    def default_pauses(self) -> int:
        """M where none is given: M_ft of the model's configuration, or 0 without one."""
        return self.pause.m_ft or 0

    @torch.no_grad()
    @accept_earlier_keywords
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        pauses: Pauses = None,
        max_new_tokens: int | None = None,
        prompting: Prompting | None = None,
        sampling: Sampling = GREEDY,
        limits: Limits = DEFAULT_LIMITS,
        stream: Callable[[int, str], None] | None = None,
        keep_logits: bool = False,
    ) -> Generation:
        """Generate answers to prompts, as one batch. Each answer is the one that its prompt would get alone.

        Args:
            prompts: Texts, in which no special token is recognized; or token ids.
            pauses: M, a policy, or one of these for each prompt; None for `default_pauses`.
            max_new_tokens: Maximum length of an answer, in tokens; None for that of `limits`.
            prompting: Location, filler and prefix attention of the pauses; None for the model's own.
            sampling: Token selection; greedy by default.
            limits: Other criteria that end an answer: stop texts, end-of-sequence tokens.
            stream: Called with (index of the prompt, piece of text) as soon as text is certain.
            keep_logits: Keep the logits that each new token was selected from.

        Returns:
            The answers, in the order of the prompts, and their cost.

        Raises:
            ConfigError: A value out of its range, pauses for a model without any, an empty prompt, or more positions
                than the model has. Raised before any forward pass.
            DataError: A prompt that cannot be encoded.
        """
        limits = limits if max_new_tokens is None else replace(limits, max_new_tokens=max_new_tokens)
        prompting = self.pause.prompting if prompting is None else prompting
        prefixes = self._prefixes(prompts, pauses, prompting, [limits.max_new_tokens] * len(prompts))
        sampling.row_numbers(len(prefixes))  # raises where they do not fit
        if not prefixes:
            return Generation((), Cost())
        meter = _Meter(Session(self.model, len(prefixes), self.pause.without_positions))
        logits, used = prefill(meter.session, prefixes, self.pause.ids, bidirectional=_bidirectional(prompting))
        meter.end_prefill()
        answers = [Answer(self.encoder, () if limits.ignore_eos else self.eos, limits) for _ in prefixes]
        suppressed = [*self.pause.ids, *(self.eos if limits.ignore_eos else ())]
        kept: list[list[Tensor]] = [[] for _ in prefixes]

        def on_token(row: int, row_logits: Tensor, text: str) -> None:
            if keep_logits:
                kept[row].append(row_logits.cpu())
            if text and stream is not None:
                stream(row, text)

        _decode(meter.session, logits, answers, lambda *step: _select(sampling, suppressed, *step), on_token)
        rows = zip(answers, prefixes, used, [torch.stack(row) if row else None for row in kept], strict=True)
        return Generation(
            tuple(
                Completion(answer.text, tuple(answer.ids), answer.finish, prefix.prompt_tokens, count, row_logits)
                for answer, prefix, count, row_logits in rows
            ),
            meter.cost(),
        )

    @torch.no_grad()
    @accept_earlier_keywords
    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        *,
        pauses: Pauses = None,
        prompting: Prompting | None = None,
    ) -> tuple[tuple[Score, ...], Cost]:
        """Compute the log-likelihood of given continuations after prompts and pauses, as one batch.

        Pause ids take no part in the softmax, since they are never emitted. A prompt that occurs several times, as in
        the choices of a question, is computed once.

        Args:
            prompts: As for `generate`.
            continuations: One for each prompt: a text that follows the prompt, or token ids.
            pauses: As for `generate`.
            prompting: As for `generate`.

        Returns:
            A score for each prompt, and the cost of the batch.

        Raises:
            ConfigError: As for `generate`, or an empty continuation.
            DataError: A prompt or continuation that cannot be encoded.
        """
        if len(continuations) != len(prompts):
            raise ConfigError(f"continuations: expected {len(prompts)}, one for each prompt, got {len(continuations)}")
        targets = [
            self.encoder.encode_continuation(text) if isinstance(text, str) else list(text) for text in continuations
        ]
        if not all(targets):
            raise ConfigError(f"continuation {targets.index([])}: expected at least one token, got none")
        prompting = self.pause.prompting if prompting is None else prompting
        prefixes = self._prefixes(prompts, pauses, prompting, [len(ids) for ids in targets])
        if not prefixes:
            return (), Cost()
        distinct, rows = deduplicate(prefixes)
        meter = _Meter(Session(self.model, len(distinct), self.pause.without_positions))
        first, used = prefill(meter.session, distinct, self.pause.ids, bidirectional=_bidirectional(prompting))
        meter.session.select_rows(rows)
        first = first[rows]
        meter.end_prefill()
        sums = _log_likelihoods(meter.session, first, targets, list(self.pause.ids))
        scores = [Score(total, len(ids), used[row]) for total, ids, row in zip(sums, targets, rows, strict=True)]
        return tuple(scores), meter.cost()

    def _prefixes(
        self, prompts: Sequence[Prompt], pauses: Pauses, prompting: Prompting, new_tokens: Sequence[int]
    ) -> list[Prefix]:
        """Check everything that can be checked before the first forward pass."""
        if isinstance(prompts, str):
            raise ConfigError("prompts: expected a list of prompts, got one string")
        policies = self._policies(pauses, len(prompts))
        prefixes = [
            build_prefix(self.encoder, prompt, policy, prompting, name=f"prompt {i}")
            for i, (prompt, policy) in enumerate(zip(prompts, policies, strict=True))
        ]
        for i, (prefix, count) in enumerate(zip(prefixes, new_tokens, strict=True)):
            prefix.check(self.model.config, f"prompt {i}", count, prompting, self.pause.without_positions)
        return prefixes

    def _policies(self, pauses: Pauses, count: int) -> list[PausePolicy]:
        pauses = self.default_pauses if pauses is None else pauses
        each = list(pauses) if isinstance(pauses, Sequence) else [pauses] * count
        if len(each) != count:
            raise ConfigError(f"pauses: expected {count} numbers, one for each prompt, got {len(each)}")
        policies = [_policy(item) for item in each]
        for policy in policies:
            if not isinstance(policy, PausePolicy):
                raise ConfigError(f"pauses: expected a number, a PausePolicy, or a list of these, got {policy!r}")
        return policies


def _policy(pauses: int | PausePolicy) -> PausePolicy:
    return FixedPauses(pauses) if isinstance(pauses, int) else pauses


class _Meter:
    """Compute and time of one session, from now on."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._start = self._prefilled = time.perf_counter()
        self._prefill_passes = 0

    def end_prefill(self) -> None:
        self.session.synchronize()
        self._prefilled, self._prefill_passes = time.perf_counter(), self.session.forward_passes

    def cost(self) -> Cost:
        decode = time.perf_counter() - self._prefilled
        session, prefill = self.session, self._prefilled - self._start
        return Cost(session.forward_passes, self._prefill_passes, session.positions, prefill, decode)


def _bidirectional(prompting: Prompting) -> bool:
    return prompting.prefix_attention == "bidirectional"


def _select(sampling: Sampling, suppressed: list[int], logits: Tensor, position: int) -> list[int]:
    logits = logits.clone()
    logits[:, suppressed] = float("-inf")
    return sampling.select(logits, position)


def _decode(
    session: Session,
    logits: Tensor,
    answers: Sequence[Answer],
    select: Callable[[Tensor, int], list[int]],
    on_token: Callable[[int, Tensor, str], None],
) -> None:
    """Decode until every answer has ended.

    Args:
        session: The batch after its prefill.
        logits: Logits of the first new tokens, fp32 [batch, vocab].
        answers: The rows' answers, [batch]; they are filled.
        select: Selects the next token of every row from (logits, position).
        on_token: Called with (row, its logits, text that is certain now) for every new token.
    """
    position = 0
    while True:
        tokens = select(logits, position)
        for row, answer in enumerate(answers):
            if not answer.finish:
                on_token(row, logits[row], answer.push(tokens[row]))
        if all(answer.finish for answer in answers):
            return
        logits = session.forward([[] if a.finish else [a.ids[-1]] for a in answers])[:, -1]
        position += 1


def _log_likelihoods(
    session: Session, first: Tensor, targets: Sequence[list[int]], suppressed: list[int]
) -> list[float]:
    """Log-likelihood of every row's target, in nats; `first` are the logits of its first token, [batch, vocab]."""
    longest = max(map(len, targets))
    logits = first[:, None]
    if longest > 1:
        rest = session.forward([ids[:-1] for ids in targets], keep=longest - 1)
        logits = torch.cat([logits, rest], dim=1)
    logits[..., suppressed] = float("-inf")
    sums = []
    for row, ids in zip(logits.log_softmax(-1), targets, strict=True):
        # A row's first token is in slot 0, its others are at the right end.
        predicted = torch.cat([row[:1], row[longest - len(ids) + 1 :]])
        chosen = predicted.gather(1, torch.tensor(ids, device=predicted.device)[:, None])
        sums.append(float(chosen.double().sum()))
    return sums
