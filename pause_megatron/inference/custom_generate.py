"""Decoding method with pauses for transformers' `model.generate`; needs torch and transformers, not this package.

As a callable it needs no trust_remote_code: `model.generate(**inputs, custom_generate=pause_generate, pauses=10)`.
Copied to FOLDER/custom_generate/generate.py it serves `model.generate(**inputs, custom_generate=FOLDER, pauses=10)`,
which transformers allows only to callers who set trust_remote_code.

The pauses are computed after the prompt, in the prefill. Logits processors, stopping criteria and the result do not see
them: lengths, penalties and stop conditions count text only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
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
        **model_kwargs: attention_mask ([batch, seq], or None) and others, as `generate` prepares them. `generate` would
            drop any of these that was a named parameter here.

    Returns:
        Prompts and new tokens without pauses, int64 [batch, seq + new tokens]; or a GenerateDecoderOnlyOutput of these
        sequences, if `return_dict_in_generate` is set.

    Raises:
        ValueError: A model without pauses or with a bidirectional prefix, beam search, a cache that is not empty, or
            too many positions.
    """
    pause_ids, count = _pauses(model.config, pauses)
    given = model_kwargs.get(CACHE)
    if given is not None and given.get_seq_length() > 0:
        raise ValueError(
            "pauses: expected an empty cache, since they belong to the prefill of the prompt, got a filled one"
        )
    _check(model.config, generation_config, input_ids.shape[1], count)
    input_ids = input_ids.to(model.device)
    rows = input_ids.shape[0]
    run = torch.tensor([pause_ids[i % len(pause_ids)] for i in range(count)], dtype=torch.int64, device=model.device)
    step = torch.cat([input_ids, run.expand(rows, -1)], dim=1)
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(model.device)
    mask = torch.cat([mask, mask.new_ones(rows, count)], dim=1)
    # A pause that shares the position of the text token before it uses up none.
    counted = mask * ~torch.isin(step, run.new_tensor(pause_ids)) if _shares_positions(model.config) else mask
    positions = (counted.cumsum(1) - 1).clamp(min=0)
    following = counted.sum(1, keepdim=True)
    cache = DynamicCache(config=model.config)
    pad = generation_config._pad_token_tensor
    unfinished = torch.ones(rows, dtype=torch.bool, device=model.device)
    while True:
        output = model(
            input_ids=step,
            attention_mask=None if mask.all() else mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        )
        logits = output.logits[:, -1].to(torch.float32, copy=True)
        logits[:, pause_ids] = float("-inf")
        scores = logits_processor(input_ids, logits)
        sample = generation_config.do_sample
        chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if sample else scores.argmax(-1)
        if pad is not None:
            chosen = torch.where(unfinished, chosen, pad.to(chosen))
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
        if not unfinished.any():
            break
        step, mask = chosen[:, None], torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        positions, following = following, following + 1
    if generation_config.return_dict_in_generate:
        fields: dict[str, Any] = {"sequences": input_ids, CACHE: cache}
        return GenerateDecoderOnlyOutput(**fields)
    return input_ids


def generate(
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    model: Any,
    pauses: int | None = None,
    **kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Run `model.generate` with pauses; the entry point of the copied file.

    Args:
        inputs: As for `model.generate`.
        generation_config: As for `model.generate`.
        model: The model, which transformers passes.
        pauses: As for `pause_generate`.
        **kwargs: Other arguments of `model.generate`.

    Returns:
        As `pause_generate`.

    Raises:
        ValueError: As for `pause_generate`, or a streamer, which transformers does not pass to custom decoding methods.
    """
    if kwargs.pop("streamer", None) is not None:
        raise ValueError("pauses: streamer: not supported; stream with pause_megatron.inference.PauseGenerator")
    return type(model).generate(
        model, inputs, generation_config=generation_config, custom_generate=pause_generate, pauses=pauses, **kwargs
    )


def _pauses(config: Any, pauses: int | None) -> tuple[list[int], int]:
    """Pause ids and M."""
    entry = getattr(config, "pause", None) or {}
    pause_ids = [int(token_id) for token_id in entry.get("ids") or ()]
    count = (entry.get("m_ft") or 0) if pauses is None else pauses
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"pauses: expected a whole number, 0 or more, got {count!r}")
    if count and not pause_ids:
        raise ValueError('pauses: the model has none (its config.json has no "pause" entry with "ids")')
    return pause_ids, count


def _shares_positions(config: Any) -> bool:
    """Whether a pause has the position of the text token before it, instead of one of its own."""
    return (getattr(config, "pause", None) or {}).get("positions") == "shared"


def _check(config: Any, generation_config: Any, prompt: int, pauses: int) -> None:
    """`max_length` counts prompt and new tokens, as everywhere in transformers; pauses are additional."""
    if generation_config.num_beams > 1:
        raise ValueError("pauses: expected num_beams=1 (greedy or sampling)")
    entry = getattr(config, "pause", None) or {}
    placed: tuple[tuple[str, str | None], ...] = (("location", "append"), ("filler", None)) if pauses else ()
    for name, supported in (("prefix_attention", "causal"), *placed):
        if entry.get(name, supported) != supported:
            raise ValueError(
                f"pauses: the model's {name} is {entry[name]!r}; use pause_megatron.inference.PauseGenerator"
            )
    if _shares_positions(config):
        if config._attn_implementation not in ("sdpa", "eager"):  # it reads repeated positions as several packed texts
            raise ValueError(
                "pauses: positions: expected a model loaded with attn_implementation='sdpa' or 'eager', got "
                f"{config._attn_implementation!r}"
            )
        pauses = 0
    available, max_length = getattr(config, "max_position_embeddings", None), generation_config.max_length
    if available is not None and max_length is not None and max_length + pauses > available:
        raise ValueError(
            f"pauses: {prompt} prompt tokens + {pauses} pauses + {max_length - prompt} new tokens = "
            f"{max_length + pauses} positions, but the model has {available} (max_position_embeddings)"
        )
