"""lm-eval's Hugging Face model with M pauses: they are added to every request's context, and to nothing else.

The text of a request shows them (`... Answer:<pause><pause>`), so what lm-eval stores of a request says how it was
asked. They become ids one by one: fillers do not merge (".." is two tokens), several pause tokens take turns, and what
is cut to fit the model is text. Without pauses, requests are HFLM's own, token for token.

Pauses are not put into few-shot examples or targets. They do not apply to `loglikelihood_rolling`, which has no
context. The pause ids take no part in the softmax, as in `PauseGenerator.score`, and are never generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from pause_megatron.inference import PauseGenerator


class PauseLM(HFLM):
    """To be given to `lm_eval.simple_evaluate(model=PauseLM(load("out/"), pauses=10), tasks=[...])`.

    Args:
        generator: the model, as `inference.load` gives it.
        pauses: M; None: what the model was finetuned with.
        location: "append", or "prepend" (behind a BOS); None: the model's own.
        filler: text of an ordinary token in place of `<pause>`; "": pauses; None: the model's own.
        batch_size: rows of a forward pass.
        quiet: show no progress bars.

    Raises:
        ConfigError: pauses for a model that has none, a filler of several tokens, or a bidirectional prefix.
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
    ) -> None:
        if generator.pause.prompting.prefix_attention != "causal":
            raise ConfigError(
                "lm-eval asks causal models; this one has a bidirectional prefix (pause.prefix_attention in its "
                "config.json): evaluate it on the tasks of this project"
            )
        settings = own_settings(generator, pauses=pauses, location=location, filler=filler)
        filler = settings.filler
        self._generator = generator
        self._count = settings.pauses
        self._location = settings.location
        self._filler = () if filler is None else (generator.encoder.filler_id(filler),)
        self._names = generator.encoder.tokenizer.convert_ids_to_tokens(list(generator.pause.ids))
        if self._count and filler is None and not self._names:
            raise ConfigError('the model has no pause token: use pauses=0, or a filler such as "."')
        self._text = "".join(islice(cycle([filler] if filler is not None else self._names or [""]), self._count))
        self._quiet = quiet
        super().__init__(
            generator.model, backend="causal", tokenizer=generator.encoder.tokenizer, batch_size=batch_size
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations behind contexts and pauses."""
        return super().loglikelihood(self._paused(requests), disable_tqdm=disable_tqdm or self._quiet)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in which there is no place for pauses."""
        self._refuse_pauses_in_text(request.args[0] for request in requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self._quiet)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow contexts and pauses."""
        return super().generate_until(self._paused(requests), disable_tqdm=disable_tqdm or self._quiet)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take lm-eval's store of answers (`use_cache`), whose keys do not say how many pauses there were.

        Raises:
            DataError: it holds answers with other pauses.
        """
        if cache_hook.dbdict is not None:
            mine = f"{self._count} x {self._location} {self._text[:80]!r}"
            found = cache_hook.dbdict.get("pauses", mine if not len(cache_hook.dbdict) else "no pauses")
            if found != mine:
                raise DataError(f"use_cache: expected answers with {mine}, got a store of answers with {found}")
            cache_hook.dbdict["pauses"] = mine
        super().set_cache_hook(_OriginalKeys(cache_hook, self._without_pauses))

    def _paused(self, requests: Sequence[Instance]) -> list[Instance]:
        """The requests with pauses in their contexts."""
        self._refuse_pauses_in_text(text for request in requests for text in request.args if isinstance(text, str))
        paused = []
        for request in requests:
            context, *others = request.args
            if self._count:
                spaces = len(context) - len(context.rstrip())
                if spaces and isinstance(others[0], str):  # HFLM scores them with the continuation; so behind pauses
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
                    raise DataError(f"a request spells {name}, which lm-eval would turn into a pause: {text[-80:]!r}")

    def _with_pauses(self, context: list[int], room: int) -> list[int]:
        """Ids of a context and its pauses; what does not fit is cut from the left of the context, as HFLM cuts it."""
        if room <= self._count:
            raise ConfigError(f"expected room for text beside {self._count} pauses; the model leaves {room} positions")
        cut = context[-(room - self._count) :]
        return self._generator.encoder.with_pauses(cut, self._count, self._location, self._filler)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not self._count:
            return super()._encode_pair(context, continuation)
        text = self._without_pauses(context)
        before = self.tok_encode(text) if text else [self.prefix_token_id]
        whole = self.tok_encode(text + continuation)
        # Where text and continuation share a token, the pauses stand in its middle: the continuation is another one.
        apart = text and whole[: len(before)] == before and len(whole) > len(before)
        after = whole[len(before) :] if apart else self._generator.encoder.encode_continuation(continuation)
        return self._with_pauses(before, self.max_length + 1 - len(after)), after

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Contexts with their pauses as ids and mask, int64 [batch, longest] each; padded on the left."""
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
        logits = super()._model_call(inps, attn_mask, labels)
        logits[..., list(self._generator.pause.ids)] = float("-inf")
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        if self._generator.pause.ids:
            generation_kwargs["suppress_tokens"] = list(self._generator.pause.ids)
        return super()._model_generate(context, max_length, stop, **generation_kwargs)


class _OriginalKeys(CacheHook):
    """Stores answers under the requests as lm-eval made them, which is how it looks for them."""

    def __init__(self, hook: CacheHook, original: Any) -> None:
        self.dbdict = hook.dbdict
        self._original = original

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Take one answer."""
        context, *others = req
        super().add_partial(attr, (self._original(context), *others), res)
