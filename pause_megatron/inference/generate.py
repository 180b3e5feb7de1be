"""Generation with pauses: one prefill of the prompt and its M pauses, then decoding with the key-value cache.

Goyal et al., "Think before you speak", ICLR 2024, section 3.3; method.md, section 3: the pauses are appended to the
prompt in the same forward pass, every output before the last pause is ignored, the answer's first token is read from
the last pause, and `<pause>` itself is never emitted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pause_megatron.data.windows.pause import LOCATIONS
from pause_megatron.errors import ConfigError
from pause_megatron.inference.adaptive import FixedPauses, PausePolicy
from pause_megatron.inference.answer import Answer
from pause_megatron.inference.prefill import Prefix, distinct, prefill, prepare
from pause_megatron.inference.prompts import PREFIX_ATTENTIONS, PauseInfo, PromptEncoder
from pause_megatron.inference.results import Completion, Cost, Generation, Score
from pause_megatron.inference.sampling import Sampling
from pause_megatron.inference.session import Session

Prompt = str | Sequence[int]
Pauses = int | PausePolicy | Sequence[int | PausePolicy] | None


class PauseGenerator:
    """Prompts a transformers causal language model of the Llama family (Llama, Mistral, Qwen2, ...) with pauses.

    Args:
        model: the model; it is put into eval mode.
        tokenizer: its fast tokenizer.
        pause: the model's pauses; None: as its configuration and its tokenizer say.

    Raises:
        DataError: the configuration's "pause" entry does not fit model or tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, pause: PauseInfo | None = None) -> None:
        self.model = model.eval()
        self.pause = PauseInfo.of(model.config, tokenizer) if pause is None else pause
        self.encoder = PromptEncoder(tokenizer, self.pause)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.eos = tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (ends,)

    @property
    def default_pauses(self) -> int:
        """M where none is given: M_ft of the model's configuration, or 0 if that does not name one."""
        return self.pause.m_ft or 0

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        pauses: Pauses = None,
        location: str | None = None,
        filler: str | None = None,
        prefix_attention: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        rows: Sequence[int] | None = None,
        stream: Callable[[int, str], None] | None = None,
        keep_logits: bool = False,
    ) -> Generation:
        """Continue prompts, as one batch. Each answer is the one its prompt would get alone.

        Args:
            prompts: texts, or token ids. Text never becomes a special token, whatever it spells.
            pauses: M, a policy, or one of these for each prompt; None: `default_pauses`.
            location: "append" or "prepend" (before the prompt, after a BOS); None: as the model's configuration says.
            filler: text of one ordinary token to use in place of `<pause>`, the control; "": `<pause>` itself; None: as
                the model's configuration says.
            prefix_attention: "causal", or "bidirectional": prompt and pauses see each other in both directions, the
                answer is causal (a prefix-LM); None: as the model's configuration says.
            max_new_tokens: tokens of an answer at most.
            temperature, top_k, top_p, seed: see Sampling; temperature 0 is greedy.
            stop: texts that end an answer; they are not part of it.
            ignore_eos: go on behind an end-of-sequence token, which is then not emitted at all.
            rows: numbers of the prompts, which address their random draws; None: 0, 1, ...
            stream: called with (index of the prompt, piece of text) as soon as text is certain.
            keep_logits: keep the logits that each new token was chosen from.

        Raises:
            ConfigError: a value out of its range, pauses for a model without any, an empty prompt, or more positions
                than the model has. Before any work is done.
            DataError: a prompt that cannot be encoded.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        numbers = list(range(len(prompts)) if rows is None else rows)
        _check_answers(len(prompts), numbers, max_new_tokens, stop)
        new_tokens = [max_new_tokens] * len(prompts)
        attention, prefixes = self._prefixes(prompts, pauses, location, filler, prefix_attention, new_tokens)
        if not prefixes:
            return Generation((), Cost(0, 0, 0, 0.0, 0.0))
        begun = time.perf_counter()
        session = Session(self.model, len(prefixes))
        logits, used = prefill(session, prefixes, self.pause.ids, bidirectional=attention == "bidirectional")
        session.wait()
        prefilled, prefill_passes = time.perf_counter(), session.forward_passes
        answers = [Answer(self.encoder, () if ignore_eos else self.eos, stop, max_new_tokens) for _ in prefixes]
        hidden = [*self.pause.ids, *(self.eos if ignore_eos else ())]
        kept = _decode(session, logits, answers, sampling, numbers, hidden, stream, keep_logits)
        spent = time.perf_counter() - prefilled
        cost = Cost(session.forward_passes, prefill_passes, session.positions, prefilled - begun, spent)
        return Generation(
            tuple(
                Completion(answer.text, tuple(answer.ids), answer.finish, prefix.prompt_tokens, count, of_row)
                for answer, prefix, count, of_row in zip(answers, prefixes, used, kept, strict=True)
            ),
            cost,
        )

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        *,
        pauses: Pauses = None,
        location: str | None = None,
        filler: str | None = None,
        prefix_attention: str | None = None,
    ) -> tuple[tuple[Score, ...], Cost]:
        """Log-likelihood of given continuations behind prompts and pauses, as one batch.

        Args:
            continuations: one for each prompt. A text is encoded as one that goes on from its prompt.

        Others, and errors, as for `generate`. Pause ids take no part in the softmax, as they are never emitted. A
        prompt that comes several times (the choices of a question do) is computed once.
        """
        if len(continuations) != len(prompts):
            raise ConfigError(f"expected {len(prompts)} continuations, one for each prompt, came {len(continuations)}")
        wanted = [
            self.encoder.encode_continuation(text) if isinstance(text, str) else list(text) for text in continuations
        ]
        if not all(wanted):
            raise ConfigError(f"continuation {wanted.index([])}: expected at least one token")
        longest = max(map(len, wanted), default=1)
        attention, prefixes = self._prefixes(
            prompts, pauses, location, filler, prefix_attention, [len(ids) for ids in wanted]
        )
        if not prefixes:
            return (), Cost(0, 0, 0, 0.0, 0.0)
        begun = time.perf_counter()
        alone, rows = distinct(prefixes)
        session = Session(self.model, len(alone))
        first, used = prefill(session, alone, self.pause.ids, bidirectional=attention == "bidirectional")
        session.spread(rows)
        first, used = first[rows], [used[row] for row in rows]
        session.wait()
        prefilled, passes = time.perf_counter(), session.forward_passes
        logits = first[:, None]
        if longest > 1:
            rest = session.forward([ids[:-1] for ids in wanted], keep=longest - 1)
            logits = torch.cat([logits, rest], dim=1)
        logits[..., list(self.pause.ids)] = float("-inf")
        scores = []
        for of_row, ids, count in zip(logits.log_softmax(-1), wanted, used, strict=True):
            # A row's first token is in slot 0, its others stand at the right end.
            of_tokens = torch.cat([of_row[:1], of_row[longest - len(ids) + 1 :]])
            chosen = of_tokens.gather(1, torch.tensor(ids, device=of_tokens.device)[:, None])
            scores.append(Score(float(chosen.double().sum()), len(ids), count))
        spent = time.perf_counter() - prefilled
        return tuple(scores), Cost(session.forward_passes, passes, session.positions, prefilled - begun, spent)

    def _prefixes(
        self,
        prompts: Sequence[Prompt],
        pauses: Pauses,
        location: str | None,
        filler: str | None,
        prefix_attention: str | None,
        new_tokens: Sequence[int],
    ) -> tuple[str, list[Prefix]]:
        """Check everything that can be checked before the first forward pass."""
        attention = self.pause.prefix_attention if prefix_attention is None else prefix_attention
        location = self.pause.location if location is None else location
        filler = self.pause.filler if filler is None else filler
        for name, value, allowed in (
            ("location", location, LOCATIONS),
            ("prefix_attention", attention, PREFIX_ATTENTIONS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, came {value!r}")
        if isinstance(prompts, str):
            raise ConfigError("prompts: expected a list of prompts, came one string")
        policies = self._policies(pauses, len(prompts))
        fillers = (self.encoder.filler_id(filler),) if filler else ()
        prefixes = [
            prepare(self.encoder, prompt, policy, location, fillers, name=f"prompt {i}")
            for i, (prompt, policy) in enumerate(zip(prompts, policies, strict=True))
        ]
        for i, (prefix, count) in enumerate(zip(prefixes, new_tokens, strict=True)):
            prefix.check(self.model.config, f"prompt {i}", count, location, attention)
        return attention, prefixes

    def _policies(self, pauses: Pauses, count: int) -> list[PausePolicy]:
        pauses = self.default_pauses if pauses is None else pauses
        each = list(pauses) if isinstance(pauses, Sequence) else [pauses] * count
        if len(each) != count:
            raise ConfigError(f"pauses: expected {count} numbers, one for each prompt, came {len(each)}")
        policies = [FixedPauses(item) if isinstance(item, int) else item for item in each]
        for policy in policies:
            if not isinstance(policy, PausePolicy):
                raise ConfigError(f"pauses: expected a number, a PausePolicy, or a list of these, came {policy!r}")
        return policies


def _check_answers(prompts: int, numbers: Sequence[int], max_new_tokens: int, stop: Sequence[str]) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: expected 1 or more, came {max_new_tokens}")
    if isinstance(stop, str) or any(not text for text in stop):
        raise ConfigError(f"stop: expected a list of texts, none of them empty, came {stop!r}")
    if len(numbers) != prompts:
        raise ConfigError(f"rows: expected {prompts} numbers, one for each prompt, came {len(numbers)}")


def _decode(
    session: Session,
    logits: Tensor,
    answers: list[Answer],
    sampling: Sampling,
    numbers: list[int],
    hidden: list[int],
    stream: Callable[[int, str], None] | None,
    keep_logits: bool,
) -> Sequence[Tensor | None]:
    """Choose tokens until every answer has ended. Returns each row's logits [new tokens, vocab], None if not kept."""
    kept: list[list[Tensor]] = [[] for _ in answers]
    position = 0
    while True:
        allowed = logits.clone()
        allowed[:, hidden] = float("-inf")
        chosen = sampling.choose(allowed, numbers, position)
        for i, answer in enumerate(answers):
            if answer.finish:
                continue
            if keep_logits:
                kept[i].append(logits[i].cpu())
            piece = answer.push(chosen[i])
            if piece and stream is not None:
                stream(i, piece)
        if all(answer.finish for answer in answers):
            return [torch.stack(of_row) for of_row in kept] if keep_logits else [None] * len(kept)
        logits = session.forward([[] if a.finish else [a.ids[-1]] for a in answers])[:, -1]
        position += 1
