"""lm-eval's Hugging Face model (HFLM) with M pauses in every request's context.

The text of a request shows the pauses (`... Answer:<pause><pause>`), so lm-eval's cached requests record them. Each
pause becomes one id: fillers do not merge (".." is two tokens), and several pause tokens alternate. Truncation removes
text, never pauses. Without pauses, requests are HFLM's own, token for token.

Few-shot examples and targets get no pauses. `loglikelihood_rolling` has no context, so pauses do not apply to it. Pause
ids are excluded from the softmax, as in `PauseGenerator.score`, and are never generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from pause_megatron.errors import ConfigError, DataError
from pause_megatron.evaluate.scoring import own_settings
from pause_megatron.inference import DecodingPauses, PauseGenerator
from pause_megatron.inference.custom_generate import pause_generate

_NONE_WITHIN_ANSWERS = {"pause_every": 0, "pause_after": "", "pause_entropy": float("inf"), "pause_requests": False}
"""Options of `pause_generate` where the model's own pauses within answers are switched off."""


class PauseLM(HFLM):
    """HFLM with pauses, for `lm_eval.simple_evaluate(model=PauseLM(load("out/"), pauses=10), tasks=[...])`.

    Args:
        generator: The model, as `inference.load` returns it.
        pauses: Number of pauses, M; None for the number that the model was finetuned with.
        location: "append", or "prepend" (after a BOS); None for the model's own.
        filler: Text of an ordinary token that replaces `<pause>`; "" for pauses; None for the model's own.
        batch_size: Rows of a forward pass.
        quiet: Whether to hide progress bars.
        decoding: Pauses within answers, which lm-eval cannot have: `DecodingPauses()` where the model has its own.

    Raises:
        ConfigError: Pauses within answers, no pause token, a filler of several tokens, or a bidirectional prefix.
    """

    def __init__(
        self,
        generator: PauseGenerator,
        *,
        pauses: int | None = None,
        location: str | None = None,
        filler: str | None = None,
        batch_size: int = 8,
        quiet: bool = False,
        decoding: DecodingPauses | None = None,
    ) -> None:
        if generator.pause.prompting.prefix_attention != "causal":
            raise ConfigError(
                "lm-eval: expected a causal model, got one that has a bidirectional prefix (pause.prefix_attention in "
                "its config.json); evaluate it on the tasks of this project"
            )
        settings = own_settings(generator, pauses=pauses, location=location, filler=filler, decoding=decoding)
        if settings.decoding:
            raise ConfigError(
                f"lm-eval: expected no pauses within answers (decoding), got {settings.decoding}; evaluate them on the "
                "tasks of this project, or switch them off (--pause-every 0, --pause-after '', --no-pause-requests)"
            )
        filler = settings.filler
        self._generator = generator
        self._count = settings.pauses
        self._location = settings.location
        self._filler = () if filler is None else (generator.encoder.filler_id(filler),)
        self._shares_positions = generator.pause.without_positions is not None
        if self._shares_positions and self._filler and self._count:
            raise ConfigError(
                "lm-eval: expected <pause> with pause.positions=shared (config.json), got a filler, whose places a "
                "batch of token ids does not tell; evaluate it on the tasks of this project"
            )
        self._names = generator.encoder.tokenizer.convert_ids_to_tokens(list(generator.pause.ids))
        if self._count and filler is None and not self._names:
            raise ConfigError('the model has no pause token: use pauses=0, or a filler such as "."')
        self._text = "".join(islice(cycle([filler] if filler is not None else self._names or [""]), self._count))
        self._quiet = quiet
        super().__init__(
            generator.model, backend="causal", tokenizer=generator.encoder.tokenizer, batch_size=batch_size
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihoods of continuations after contexts and pauses.

        Args:
            requests: (context, continuation) requests.
            disable_tqdm: Whether to hide the progress bar.
        """
        return super().loglikelihood(self.paused(requests), disable_tqdm=disable_tqdm or self._quiet)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts, to which pauses do not apply.

        Args:
            requests: Requests of one text each.
            disable_tqdm: Whether to hide the progress bar.
        """
        self._refuse_pauses_in_text(request.args[0] for request in requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self._quiet)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the texts generated after contexts and pauses.

        Args:
            requests: (context, generation options) requests.
            disable_tqdm: Whether to hide the progress bar.
        """
        return super().generate_until(self.paused(requests), disable_tqdm=disable_tqdm or self._quiet)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Set lm-eval's cache of answers (`use_cache`). Its keys do not contain the pauses, so the cache records them.

        Raises:
            DataError: The cache holds answers with other pauses.
        """
        if cache_hook.dbdict is not None:
            mine = f"{self._count} x {self._location} {self._text[:80]!r}"
            found = cache_hook.dbdict.get("pauses", mine if not len(cache_hook.dbdict) else "no pauses")
            if found != mine:
                raise DataError(f"use_cache: expected answers with {mine}, got a cache of answers with {found}")
            cache_hook.dbdict["pauses"] = mine
        super().set_cache_hook(_OriginalKeys(cache_hook, self._without_pauses))

    def paused(self, requests: Sequence[Instance]) -> list[Instance]:
        """Return the requests with pauses in their contexts."""
        self._refuse_pauses_in_text(text for request in requests for text in request.args if isinstance(text, str))
        paused = []
        for request in requests:
            context, *others = request.args
            if self._count:
                spaces = len(context) - len(context.rstrip())
                if spaces and isinstance(
                    others[0], str
                ):  # HFLM scores them with the continuation: they follow the pauses
                    others[0], context = context[-spaces:] + others[0], context[:-spaces]
                context = context + self._text if self._location == "append" else self._text + context
            paused.append(replace(request, arguments=(context, *others)))
        return paused

    def _without_pauses(self, context: str) -> str:
        append = self._location == "append"
        return context.removesuffix(self._text) if append else context.removeprefix(self._text)

    def _refuse_pauses_in_text(self, texts: Iterable[str]) -> None:
        for text in texts:
            for name in self._names:
                if name in text:
                    raise DataError(
                        f"a request: expected text without {name}, which would become a pause, got {text[-80:]!r}"
                    )

    def _with_pauses(self, context: list[int], room: int) -> list[int]:
        """Return ids of a context and its pauses; the context is cut from the left to fit, as in HFLM."""
        if room <= self._count:
            raise ConfigError(f"expected room for text beside {self._count} pauses, got {room} positions")
        cut = context[-(room - self._count) :]
        return self._generator.encoder.with_pauses(cut, self._count, self._location, self._filler)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not self._count:
            return super()._encode_pair(context, continuation)
        text = self._without_pauses(context)
        before = self.tok_encode(text) if text else [self.prefix_token_id]
        whole = self.tok_encode(text + continuation)
        # If text and continuation share a token, the pauses split it: the continuation is tokenized alone.
        separate = text and whole[: len(before)] == before and len(whole) > len(before)
        after = whole[len(before) :] if separate else self._generator.encoder.encode_continuation(continuation)
        return self._with_pauses(before, self.max_length + 1 - len(after)), after

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return ids and mask of contexts with their pauses, int64 [batch, longest] each, padded on the left.

        Args:
            strings: Contexts with pauses in their text.
            padding_side: As in HFLM; "left" with pauses.
            left_truncate_len: Length limit, tokens; None for the model's.
            truncation: As in HFLM.
        """
        if not self._count:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        texts = [self._without_pauses(string) for string in strings]
        room = left_truncate_len or self.max_length
        rows = [self._with_pauses(self.tok_encode(text) if text else [self.prefix_token_id], room) for text in texts]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids, mask

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        logits = self._logits(inps) if self._shares_positions else super()._model_call(inps, attn_mask, labels)
        logits[..., list(self._generator.pause.ids)] = float("-inf")
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        if self._generator.pause.ids:
            generation_kwargs["suppress_tokens"] = list(self._generator.pause.ids)
        if self._shares_positions:  # pauses are in the context; generate itself counts positions by tokens
            generation_kwargs |= {"custom_generate": pause_generate, "pauses": 0, **_NONE_WITHIN_ANSWERS}
        return super()._model_generate(context, max_length, stop, **generation_kwargs)

    @torch.no_grad()
    def _logits(self, tokens: Tensor) -> Tensor:
        """Compute logits where a pause has the position of the text token before it."""
        ids = self._generator.pause.ids
        positions = ((tokens < ids.start) | (tokens >= ids.stop)).cumsum(1).sub_(1).clamp_(min=0)
        # Without a mask, transformers takes repeated positions for the beginnings of other texts.
        return self.model(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits


class _OriginalKeys(CacheHook):
    """A cache hook that stores answers under lm-eval's requests without pauses, by which lm-eval looks them up."""

    def __init__(self, hook: CacheHook, original: Callable[[str], str]) -> None:
        self.dbdict = hook.dbdict
        self._original = original

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Store one answer; the arguments are lm-eval's."""
        context, *others = req
        super().add_partial(attr, (self._original(context), *others), res)
