"""Decoding method with pauses for transformers' `model.generate`; needs torch and transformers, not this package.

As a callable it needs no trust_remote_code: `model.generate(**inputs, custom_generate=pause_generate, pauses=10)`.
Copied to FOLDER/custom_generate/generate.py it serves `model.generate(**inputs, custom_generate=FOLDER, pauses=10)`,
which transformers allows only to callers who set trust_remote_code (5.0 trusts a local folder without it).

The pauses are computed after the prompt, in the prefill; `pause_every` and the like put more of them into the answer.
Logits processors, stopping criteria and the result do not see them: lengths, penalties and stop conditions count text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.logits_process import SuppressTokensLogitsProcessor
from transformers.generation.utils import GenerateDecoderOnlyOutput

# The name of the key-value cache among arguments and results of this release of transformers: "past_key_values" up to
# 5.23.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


@torch.no_grad()
def pause_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    pauses: int | None = None,
    pause_every: int | None = None,
    pause_after: str | None = None,
    pause_entropy: float | None = None,
    pause_requests: bool | None = None,
    pause_count: int | None = None,
    pause_limit: int | None = None,
    pause_in_prompt: bool | None = None,
    pause_tokenizer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode greedily or by sampling with M pauses after the prompt; a decoding method for `generate`.

    Args:
        model: A decoder-only transformers model whose config has a "pause" entry (`ids`, `m_ft`).
        input_ids: Prompts, left-padded, int64 [batch, seq].
        logits_processor: As `generate` prepares it.
        stopping_criteria: As `generate` prepares it.
        generation_config: As `generate` prepares it.
        pauses: Number of pauses, M; None for the configuration's m_ft, or 0 without one.
        pause_every: `pause_count` pauses after each n-th token of the answer; 0: never. None, here and below: as the
            configuration has it ("decoding", "requests"), or not at all.
        pause_after: The same after each token whose text, with its leading blank, contains this regular expression; "":
            never.
        pause_entropy: Pauses, `pause_count` at a time, while the next token's distribution has more entropy than this,
            nats; infinity: never.
        pause_requests: Whether the model may request pauses, one at a time, by selecting the first pause id.
        pause_count: Pauses at each place; 1 by default.
        pause_limit: Maximum number of pauses before one token on entropy and requests; 10 by default.
        pause_in_prompt: Whether the places of the prompt get pauses too; tokens are then counted from its first one.
        pause_tokenizer: The model's tokenizer, for `pause_after`.
        **model_kwargs: attention_mask ([batch, seq], or None) and others, as `generate` prepares them. `generate` would
            drop any of these that was a named parameter here.

    Returns:
        Prompts and new tokens without pauses, int64 [batch, seq + new tokens]; or a GenerateDecoderOnlyOutput of these
        sequences, if `return_dict_in_generate` is set. Its `scores` and `logits`, if asked for, are those from which
        each new token was selected, after the pauses before it.

    Raises:
        ValueError: A model without pauses or with a bidirectional prefix, beam search, embeddings as inputs, attentions
            or hidden states as outputs, a cache that is not empty, or too many positions.
    """
    pause_ids, count = _pauses(model.config, pauses)
    given = model_kwargs.get(CACHE)
    if given is not None and given.get_seq_length() > 0:
        raise ValueError(
            "pauses: expected an empty cache, since they belong to the prefill of the prompt, got a filled one"
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("pauses: inputs_embeds: expected input_ids, since pauses are ids, got embeddings")
    names = ("every", "after", "entropy", "requests", "count", "limit", "in_prompt")
    values = (pause_every, pause_after, pause_entropy, pause_requests, pause_count, pause_limit, pause_in_prompt)
    options = _Options.of(model.config, dict(zip(names, values, strict=True)), pause_tokenizer)
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    rows = [
        _Row(ids[seen.bool()].tolist(), count, pause_ids, options) for ids, seen in zip(input_ids, mask, strict=True)
    ]
    if not all(row.prefix for row in rows):
        raise ValueError("pauses: input_ids: expected at least one token, or a pause, in each row, got a row without")
    _check(model.config, generation_config, input_ids.shape[1], count, rows)
    input_ids = input_ids.to(model.device)
    batch = _Batch(model, len(rows), pause_ids)
    sample, pad = generation_config.do_sample, generation_config._pad_token_tensor
    unfinished = torch.ones(len(rows), dtype=torch.bool, device=model.device)
    logits = batch.forward([row.prefix for row in rows])
    kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
    while True:
        chosen, scores, logits = _choose(batch, rows, options, unfinished, logits, input_ids, logits_processor, sample)
        if generation_config.output_scores:
            kept["scores"].append(scores)
        if generation_config.output_logits:
            kept["logits"].append(logits)
        if pad is not None:
            chosen = torch.where(unfinished, chosen, pad.to(chosen))
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
        if not unfinished.any():
            break
        logits = batch.forward([row.follow(token) for row, token in zip(rows, chosen.tolist(), strict=True)])
    if generation_config.return_dict_in_generate:
        fields: dict[str, Any] = {"sequences": input_ids, CACHE: batch.cache}
        fields |= {name: tuple(steps) for name, steps in kept.items() if steps}
        return GenerateDecoderOnlyOutput(**fields)
    return input_ids


class _Options:
    """Pauses within the answer, as `pause_generate` describes them."""

    def __init__(
        self,
        tokenizer: Any,
        every: int = 0,
        after: str = "",
        entropy: float = float("inf"),
        requests: bool = False,
        count: int = 1,
        limit: int = 10,
        in_prompt: bool = False,
    ) -> None:
        self.tokenizer, self.every, self.after, self.entropy, self.requests = tokenizer, every, after, entropy, requests
        self.count, self.limit, self.in_prompt = count, limit, in_prompt

    @classmethod
    def of(cls, config: Any, given: dict[str, Any], tokenizer: Any) -> _Options:
        """Merge what the call gives with what the configuration has, and check it."""
        entry = getattr(config, "pause", None) or {}
        decoding = entry.get("decoding") or {}
        if not isinstance(decoding, dict):
            raise ValueError(f"pauses: decoding: expected an object in config.json, got {decoding!r}")
        own = {name: value for name, value in decoding.items() if value is not None}
        if unknown := own.keys() - given.keys():
            raise ValueError(f"pauses: decoding: expected some of {', '.join(given)}, got {min(unknown)!r}")
        cls(tokenizer, **own)._check(own, "pause.decoding.", "config.json: ")
        if entry.get("requests"):
            if "limit" in own:
                raise ValueError("config.json: pause.requests: expected no pause.decoding.limit beside it, got both")
            own |= {"requests": True, "limit": entry["requests"]}
        options = cls(tokenizer, **own | {name: value for name, value in given.items() if value is not None})
        options._check(given, "pause_")
        if options.after and tokenizer is None:
            raise ValueError("pause_after: expected pause_tokenizer=TOKENIZER with it, which knows the texts of tokens")
        if options.active and not entry.get("ids"):
            raise ValueError('pauses: the model has none (its config.json has no "pause" entry with "ids")')
        return options

    def _check(self, given: dict[str, Any], prefix: str, file: str = "") -> None:
        """Check the values, and that each given one has the mode that it belongs to; `prefix` begins their names."""
        for name, least in (("every", 0), ("count", 1), ("limit", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{file}{prefix}{name}: expected a whole number, {least} or more, got {value!r}")
        for name in ("requests", "in_prompt"):
            if not isinstance(flag := getattr(self, name), bool):
                raise ValueError(f"{file}{prefix}{name}: expected True or False, got {flag!r}")
        if not isinstance(self.entropy, (int, float)) or not self.entropy >= 0:
            raise ValueError(f"{file}{prefix}entropy: expected 0 nats or more, got {self.entropy!r}")
        try:
            re.compile(self.after)
        except (re.error, TypeError) as error:
            wrong = f"got {self.after!r} ({error})"
            raise ValueError(f"{file}{prefix}after: expected a regular expression, {wrong}") from None
        for name, used, modes in (
            ("count", self.placed or self.entropy != float("inf"), ("every", "after", "entropy")),
            ("limit", self.granted, ("entropy", "requests")),
            ("in_prompt", self.placed, ("every", "after")),
        ):
            if given.get(name) and not used:
                wanted = " or ".join(prefix + mode for mode in modes)
                raise ValueError(f"{file}{prefix}{name}: expected {wanted} with it, got none of them")

    @property
    def placed(self) -> bool:
        """Whether the text alone decides places."""
        return bool(self.every or self.after)

    @property
    def granted(self) -> bool:
        """Whether pauses depend on predictions."""
        return self.requests or self.entropy != float("inf")

    @property
    def active(self) -> bool:
        """Whether there are pauses within the answer."""
        return self.granted or self.placed

    def follows(self, token_id: int, number: int) -> int:
        """Pauses after a token."""
        if self.every and number % self.every == 0:
            return self.count
        return self.count if self.after and re.search(self.after, text := self._text(token_id)) and text else 0

    def most(self, new: int, number: int) -> int:
        """Maximum number of pauses of an answer; `number` tokens were counted before it."""
        read = new - 1
        places = read if self.after else (number + read) // self.every - number // self.every if self.every else 0
        return places * self.count + (self.limit * new if self.granted else 0)

    def _text(self, token_id: int) -> str:
        """Text that a token adds to a text: decoders strip the blank that a text begins with."""
        before = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        start = len(self.tokenizer.decode(before, **settings))
        return self.tokenizer.decode([*before, token_id], **settings)[start:]


class _Row:
    """One row: its prompt with pauses, and the pauses of its answer, whose ids are used in turn within a run."""

    def __init__(self, prompt: list[int], count: int, pause_ids: list[int], options: _Options) -> None:
        self._ids, self.options = pause_ids, options
        self._run = self.number = self.granted = 0
        self.prefix: list[int] = []
        for token_id in prompt:
            self.prefix.append(token_id)
            self._run = self._run + 1 if token_id in pause_ids else 0
            if options.in_prompt and token_id not in pause_ids:
                self.number += 1
                self.prefix += self.more(options.follows(token_id, self.number))
        self.prefix += self.more(count)
        self.granted = 0

    def more(self, count: int) -> list[int]:
        """Return pauses before the next token."""
        found = [self._ids[(self._run + i) % len(self._ids)] for i in range(count)]
        self._run += count
        self.granted += count
        return found

    def follow(self, token_id: int) -> list[int]:
        """Return a token and the pauses after it."""
        self.number += 1
        self._run = 0
        found = [token_id, *self.more(self.options.follows(token_id, self.number))]
        self.granted = 0
        return found


class _Batch:
    """The model, its cache, and which slots of the cache are in use. A row that waits leaves slots empty."""

    def __init__(self, model: Any, rows: int, pause_ids: list[int]) -> None:
        self.pause_ids = pause_ids
        self.cache = DynamicCache(config=model.config)
        self._model = model
        self._mask = torch.zeros(rows, 0, dtype=torch.int64, device=model.device)
        self._following = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self._shared = _shares_positions(model.config)

    def forward(self, rows: Sequence[list[int]]) -> Tensor:
        """Compute tokens of each row; return the logits after the last ones, fp32 [batch, vocab]."""
        width = max(map(len, rows))
        step = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self._model.device)
        lengths = torch.tensor([[len(row)] for row in rows], device=step.device)
        valid = (torch.arange(width, device=step.device) >= width - lengths).long()
        # A pause that shares the position of the text token before it uses up none.
        counted = valid * ~torch.isin(step, step.new_tensor(self.pause_ids)) if self._shared else valid
        positions = (self._following + counted.cumsum(1) - 1).clamp(min=0)
        self._following = self._following + counted.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, valid], dim=1)
        output = self._model(
            input_ids=step,
            attention_mask=None if self._mask.all() else self._mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self.cache},
        )
        return output.logits[:, -1].to(torch.float32, copy=True)


def _choose(
    batch: _Batch,
    rows: list[_Row],
    options: _Options,
    unfinished: Tensor,
    logits: Tensor,
    input_ids: Tensor,
    processors: Any,
    sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return every row's next token, after the pauses that it is granted, and the scores and logits it is chosen by."""
    waiting, found, kept = unfinished.tolist(), None, None
    while True:
        allowed = logits.clone()
        allowed[:, batch.pause_ids] = float("-inf")
        grants = [0] * len(rows)
        if options.entropy != float("inf"):
            spread = allowed.log_softmax(-1).clamp(min=-1e4)
            high = (-(spread.exp() * spread).sum(-1) > options.entropy).tolist()
            room = [min(options.count, options.limit - row.granted) for row in rows]
            grants = [left if above else 0 for left, above in zip(room, high, strict=True)]
        request = batch.pause_ids[0] if options.requests else None
        if request is not None:
            asking = [i for i, row in enumerate(rows) if waiting[i] and row.granted < options.limit and not grants[i]]
            allowed[asking, request] = logits[asking, request]
        scores = _processed(processors, input_ids, allowed, request)
        chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if sample else scores.argmax(-1)
        if request is not None:
            grants = [grant or int(token == request) for grant, token in zip(grants, chosen.tolist(), strict=True)]
        if found is None or kept is None:
            found, kept = chosen, scores
        else:
            open_rows = torch.tensor(waiting, device=chosen.device)
            found, kept = torch.where(open_rows, chosen, found), torch.where(open_rows[:, None], scores, kept)
        waiting = [wait and grant > 0 for wait, grant in zip(waiting, grants, strict=True)]
        if not any(waiting):
            return found, kept, logits
        steps = [row.more(grants[i]) if waiting[i] else [] for i, row in enumerate(rows)]
        logits = torch.where(torch.tensor(waiting, device=logits.device)[:, None], batch.forward(steps), logits)


def _processed(processors: Any, input_ids: Tensor, logits: Tensor, request: int | None) -> Tensor:
    """Scores. The suppression of the pauses in generation_config.json is not for requests, which are never shown."""
    if request is None:
        return processors(input_ids, logits)
    for processor in processors:
        asked = logits[:, request].clone()
        logits = processor(input_ids, logits)
        if isinstance(processor, SuppressTokensLogitsProcessor):
            logits[:, request] = asked
    return logits


def generate(
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    model: Any,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Run `model.generate` with pauses; the entry point of the copied file.

    Args:
        inputs: As for `model.generate`.
        generation_config: As for `model.generate`.
        model: The model, which transformers passes.
        **kwargs: `pauses` and the like, as for `pause_generate`, and other arguments of `model.generate`.

    Returns:
        As `pause_generate`.

    Raises:
        ValueError: As for `pause_generate`, or a streamer, which transformers does not pass to custom decoding methods.
    """
    if kwargs.pop("streamer", None) is not None:
        raise ValueError("pauses: streamer: not supported; stream with pause_megatron.inference.PauseGenerator")
    return type(model).generate(
        model, inputs, generation_config=generation_config, custom_generate=pause_generate, **kwargs
    )


def _pauses(config: Any, pauses: int | None) -> tuple[list[int], int]:
    """Pause ids and M."""
    entry = getattr(config, "pause", None) or {}
    pause_ids = [int(token_id) for token_id in entry.get("ids") or ()]
    count = (entry.get("m_ft") or 0) if pauses is None else pauses
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"pauses: expected a whole number, 0 or more, got {count!r}")
    if count and not pause_ids:
        raise ValueError('pauses: the model has none (its config.json has no "pause" entry with "ids")')
    return pause_ids, count


def _shares_positions(config: Any) -> bool:
    """Whether a pause has the position of the text token before it, instead of one of its own."""
    return (getattr(config, "pause", None) or {}).get("positions") == "shared"


def _check(config: Any, generation_config: Any, prompt: int, pauses: int, rows: list[_Row]) -> None:
    """`max_length` counts prompt and new tokens, as everywhere in transformers; pauses are additional."""
    if generation_config.num_beams > 1:
        raise ValueError("pauses: expected num_beams=1 (greedy or sampling)")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(f"pauses: {name}: not supported; output_scores and output_logits are")
    entry = getattr(config, "pause", None) or {}
    placed: tuple[tuple[str, str | None], ...] = (
        (("location", "append"), ("filler", None)) if pauses or rows[0].options.active else ()
    )
    for name, supported in (("prefix_attention", "causal"), *placed):
        if entry.get(name, supported) != supported:
            raise ValueError(
                f"pauses: the model's {name} is {entry[name]!r}; use pause_megatron.inference.PauseGenerator"
            )
    # Other implementations read repeated positions as several packed texts.
    if _shares_positions(config) and config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            "pauses: positions: expected a model loaded with attn_implementation='sdpa' or 'eager', got "
            f"{config._attn_implementation!r}"
        )
    available, max_length = getattr(config, "max_position_embeddings", None), generation_config.max_length
    if max_length is None:
        return
    new, options = max_length - prompt, rows[0].options
    more = max(len(row.prefix) + options.most(new, row.number) for row in rows) - prompt - pauses
    more = more if options.active else 0
    total = max_length if _shares_positions(config) else max_length + pauses + more
    if available is not None and total > available:
        within = f" + up to {more} pauses within them" if more else ""
        raise ValueError(
            f"pauses: {prompt} prompt tokens + {pauses} pauses + {new} new tokens{within} = {total} positions, but the "
            f"model has {available} (max_position_embeddings)"
        )
    window = getattr(config, "sliding_window", None)
    if options.active and len(rows) > 1 and window is not None and max_length + pauses + more > window:
        raise ValueError(f"pauses: expected one prompt at a time past the sliding window of {window}, got {len(rows)}")
