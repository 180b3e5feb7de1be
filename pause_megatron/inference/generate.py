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
from pause_megatron.inference.decode import Chooser, Row, Select, Targets, decode, log_likelihoods
from pause_megatron.inference.decoding import DecodingPauses
from pause_megatron.inference.earlier_keywords import accept_earlier_keywords
from pause_megatron.inference.limits import DEFAULT_LIMITS, Limits
from pause_megatron.inference.places import Places, pauses_between
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
        decoding: DecodingPauses | None = None,
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
            decoding: Pauses within the answers; None for the model's own, `DecodingPauses()` for none.

        Returns:
            The answers, in the order of the prompts, and their cost.

        Raises:
            ConfigError: A value out of its range, pauses for a model without any, an empty prompt, or more positions
                than the model has. Raised before any forward pass.
            DataError: A prompt that cannot be encoded.
        """
        limits = limits if max_new_tokens is None else replace(limits, max_new_tokens=max_new_tokens)
        prompting = self.pause.prompting if prompting is None else prompting
        places = self._places(decoding, prompting)
        prefixes = self._prefixes(prompts, pauses, prompting, places, [limits.max_new_tokens] * len(prompts))
        sampling.row_numbers(len(prefixes))  # raises where they do not fit
        if not prefixes:
            return Generation((), Cost())
        meter = _Meter(Session(self.model, len(prefixes), self.pause.without_positions))
        logits, used = prefill(meter.session, prefixes, self.pause.ids, bidirectional=_bidirectional(prompting))
        meter.end_prefill()
        answers = [Answer(self.encoder, () if limits.ignore_eos else self.eos, limits) for _ in prefixes]
        rows = [Row(places, prefix, count) for prefix, count in zip(prefixes, used, strict=True)]
        suppressed = [*self.pause.ids, *(self.eos if limits.ignore_eos else ())]
        kept: list[list[Tensor]] = [[] for _ in prefixes]

        def push(row: int, row_logits: Tensor, token_id: int) -> bool:
            text = answers[row].push(token_id)
            if keep_logits:
                kept[row].append(row_logits.cpu())
            if text and stream is not None:
                stream(row, text)
            return not answers[row].finish

        decode(meter.session, logits, rows, self._chooser(places, suppressed, sampling.select), push)
        return Generation(
            tuple(
                Completion(
                    answer.text,
                    tuple(answer.ids),
                    answer.finish,
                    prefix.prompt_tokens,
                    count,
                    torch.stack(row_logits) if row_logits else None,
                    tuple(row.pauses),
                    prefix.inside,
                )
                for answer, prefix, count, row_logits, row in zip(answers, prefixes, used, kept, rows, strict=True)
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
        decoding: DecodingPauses | None = None,
    ) -> tuple[tuple[Score, ...], Cost]:
        """Compute the log-likelihood of given continuations after prompts and pauses, as one batch.

        Pause ids take no part in the softmax, since they are never emitted. A prompt that occurs several times, as in
        the choices of a question, is computed once.

        Places give a continuation the pauses that it would have as an answer, in one pass. With `decoding.entropy` or
        `requests`, it is computed token by token with the pauses that greedy decoding would grant before each of them.

        Args:
            prompts: As for `generate`.
            continuations: One for each prompt: a text that follows the prompt, or token ids.
            pauses: As for `generate`.
            prompting: As for `generate`.
            decoding: As for `generate`.

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
        places = self._places(decoding, prompting)
        lengths = [len(ids) for ids in targets]
        prefixes = self._prefixes(prompts, pauses, prompting, places, lengths, together=not places.decoding.granted)
        if not prefixes:
            return (), Cost()
        distinct, rows = deduplicate(prefixes)
        meter = _Meter(Session(self.model, len(distinct), self.pause.without_positions))
        first, used = prefill(meter.session, distinct, self.pause.ids, bidirectional=_bidirectional(prompting))
        meter.session.select_rows(rows)
        meter.end_prefill()
        counts = [used[row] for row in rows]
        found = self._likelihoods(meter.session, first[rows], targets, prefixes, counts, places)
        scores = [
            Score(total, len(ids), count, tuple(inside), prefix.inside, greedy)
            for (total, greedy, inside), ids, count, prefix in zip(found, targets, counts, prefixes, strict=True)
        ]
        return tuple(scores), meter.cost()

    def _likelihoods(
        self,
        session: Session,
        first: Tensor,
        targets: Sequence[list[int]],
        prefixes: Sequence[Prefix],
        used: Sequence[int],
        places: Places,
    ) -> list[tuple[float, bool, list[tuple[int, int]]]]:
        """Log-likelihood of every row's target, whether it is the greedy answer, and its pauses."""
        if not places.decoding.granted:
            mixed = [
                places.interleave(ids, prefix.counted, prefix.run(count))
                for ids, prefix, count in zip(targets, prefixes, used, strict=True)
            ]
            found = log_likelihoods(session, first, targets, mixed, self.pause.ids)
            inside = [pauses_between(predicting) for _, predicting in mixed]
            return [(*each, pauses) for each, pauses in zip(found, inside, strict=True)]
        rows = [Row(places, prefix, count) for prefix, count in zip(prefixes, used, strict=True)]
        texts = Targets(targets, self.pause.ids.start if places.decoding.requests else None)
        texts.chooser = self._chooser(places, self.pause.ids, texts.select)
        decode(session, first, rows, texts.chooser, texts.push)
        return [(*text, row.pauses) for text, row in zip(texts.found(), rows, strict=True)]

    def _chooser(self, places: Places, suppressed: Sequence[int], select: Select) -> Chooser:
        return Chooser(places, suppressed, self.pause.ids.start if self.pause.ids else None, select)

    def _places(self, decoding: DecodingPauses | None, prompting: Prompting) -> Places:
        """Check the pauses within answers against the model."""
        decoding = self.pause.decoding if decoding is None else decoding
        if decoding.requests and not self.pause.ids:
            raise ConfigError("decoding.requests: expected a model with a pause token, to request with, got none")
        if decoding.active and not prompting.filler and not self.pause.ids:
            raise ConfigError("decoding: expected a model with a pause token, or a filler, got neither")
        filler = self.encoder.filler_id(prompting.filler) if prompting.filler and decoding.active else None
        return Places(self.encoder, decoding, self.pause.ids if filler is None else (filler,))

    def _prefixes(
        self,
        prompts: Sequence[Prompt],
        pauses: Pauses,
        prompting: Prompting,
        places: Places,
        new_tokens: Sequence[int],
        *,
        together: bool = False,
    ) -> list[Prefix]:
        """Check all that can be checked before a forward pass; `together`: only one pass follows the prefill."""
        if isinstance(prompts, str):
            raise ConfigError("prompts: expected a list of prompts, got one string")
        policies = self._policies(pauses, len(prompts))
        prefixes = [
            build_prefix(self.encoder, prompt, policy, prompting, f"prompt {i}", places)
            for i, (prompt, policy) in enumerate(zip(prompts, policies, strict=True))
        ]
        for i, (prefix, count) in enumerate(zip(prefixes, new_tokens, strict=True)):
            most = places.most(count, prefix.counted)
            without, level = self.pause.without_positions, together or len(prefixes) == 1
            prefix.check(self.model.config, f"prompt {i}", count, prompting, most, without, level=level)
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
