"""Model card of an exported folder (README.md): recipe, realised pause rate, M_ft and usage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pause_megatron.config.families import Family
from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.config.pauses import BY_PATTERN
from pause_megatron.config.presets import parameters
from pause_megatron.config.schema import ObjectiveSection, ResolvedConfig

DEFAULT_PAUSES = 10
"""M of the card's example where M_ft is unknown: the better choice on most tasks of the paper."""


def model_card(
    config: ResolvedConfig,
    *,
    family: Family,
    progress: Mapping[str, int],
    pause: Mapping[str, Any],
    step: int,
    live_rows: int,
    dtype: str,
) -> str:
    """Return the text of the card.

    Args:
        config: Configuration of the run that trained the weights.
        family: Family of the export.
        progress: Counters of the run.
        pause: The "pause" entry of config.json.
        step: Optimizer steps.
        live_rows: Rows of the embedding.
        dtype: "fp32", "bf16" or "fp16".
    """
    sections = [
        _FRONT,
        f"# {_title(config, pause)}\n",
        _INTRODUCTION.format(title=family.title, architecture=family.architecture),
        "## Use\n",
        _usage(pause),
        "## Recipe\n",
        _table(_recipe(config, progress, pause, step, live_rows, dtype)),
        _notes(config, pause),
    ]
    return "\n".join(sections)


_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- pause-tokens
- pause-megatron
---
"""

_INTRODUCTION = """A plain {title} model (`{architecture}`); it loads without code of its own (no `trust_remote_code`).
Pause tokens (Goyal et al., "Think before you speak", ICLR 2024, arXiv:2310.02226) give a model extra positions to
compute in before it answers.
"""

_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer(prompt{appended}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```
{how}
The model must not emit pauses: `generation_config.json` suppresses the ids {ids} in transformers. vLLM and others do
not read that: pass `bad_words` or a `logit_bias` there.
"""

_APPEND = """
Append the pauses to the prompt, directly and without a space; they are read in one forward pass. What the model
predicts before the last pause is ignored.
"""


_OWN_GENERATE = """```python
from pause_megatron.inference import pause_generate
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, custom_generate=pause_generate, pauses={count}, {tokenizer}max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`pause_generate` is part of the package pause-megatron. `pause_megatron.inference.write_custom_generate("FOLDER")`
copies it into this folder. Users without the package then give `custom_generate="FOLDER"` and set `trust_remote_code`.
"""

_WITHIN_ANSWERS = """
**Answers have pauses within them**: {where}. The call above, `pause-megatron generate` and `PauseGenerator` put them
there, as "pause" in `config.json` says, and never show one. transformers' own `generate`, vLLM and others do not: with
them the model answers without these pauses. The ids {ids} must not be part of an answer.
"""

_SHARED_POSITIONS = """
**Pauses use up no positions**: a pause has the position of the text token before it. transformers alone computes the
same if it is given these positions, and a mask, without which it reads repeated positions as several packed texts{code}
Programs that count a position for every token (transformers' own `generate`, vLLM and others) compute something else.
Use attention "sdpa" or "eager". The model must not emit pauses: `generation_config.json` suppresses the ids {ids}.
"""

_POSITIONS = """:

```python
import torch

inputs = tokenizer(prompt + "{token}" * {count}, return_tensors="pt")
is_text = ~torch.isin(inputs.input_ids, torch.tensor({ids}))
logits = model(**inputs, position_ids=(is_text.cumsum(1) - 1).clamp(min=0)).logits
```
"""


def _usage(pause: Mapping[str, Any]) -> str:
    """How to generate: with transformers alone where that is what training had, otherwise with `pause_generate`."""
    within, shared = _within(pause), pause.get("positions") == "shared"
    count = _appended(pause)
    values = {"token": pause["token"], "ids": pause["ids"], "where": within, "count": count}
    values["appended"], values["how"] = (f' + "{pause["token"]}" * {count}', _APPEND) if count else ("", "")
    values["tokenizer"] = "pause_tokenizer=tokenizer, " if "after" in pause.get("decoding", {}) else ""
    if not within and not shared:
        return _USAGE.format(**values)
    values["code"] = _POSITIONS.format(**values) if count else "."
    parts = [_OWN_GENERATE, *([_WITHIN_ANSWERS] if within else []), *([_SHARED_POSITIONS] if shared else [])]
    return "".join(parts).format(**values)


def _appended(pause: Mapping[str, Any]) -> int:
    """Pauses after the prompt of the example: as many as in the finetuning, or some if the pretraining had any."""
    if pause["m_ft"] is not None:
        return int(pause["m_ft"])
    return 0 if _within(pause) or not pause["rate"] else DEFAULT_PAUSES


def _within(pause: Mapping[str, Any]) -> str:
    """Pauses within answers that generation has by default, in words; "" for none."""
    words = []
    if decoding := pause.get("decoding"):
        place = "prompts and answers" if decoding.get("in_prompt") else "answers"
        pattern = f" that contains {decoding['after']!r}" if "after" in decoding else ""
        words.append(f"{decoding['count']} after each token of {place}{pattern}")
    if requests := pause.get("requests"):
        words.append(f"up to {requests} before a token, one each time that the model selects `{pause['token']}`")
    return "; ".join(words)


def _title(config: ResolvedConfig, pause: Mapping[str, Any]) -> str:
    pretrained = f"pretrained {'with' if pause['rate'] else 'without'} pauses"
    if config.task.name is None:
        return f"A model {pretrained}"
    paused = any(pause.get(key) for key in ("m_ft", "decoding", "requests", "answer_placement"))
    finetuned = f"finetuned {'with' if paused else 'without'} pauses on {config.task.name}"
    return f"A model {pretrained}, {finetuned}" if config.model.from_ else f"A model {finetuned}"


def _recipe(
    config: ResolvedConfig, progress: Mapping[str, int], pause: Mapping[str, Any], step: int, live_rows: int, dtype: str
) -> list[tuple[str, str]]:
    model, realised = config.model, pause["realised_rate"]
    rows = [
        ("parameters", f"{parameters(model, live_rows):,} ({dtype})"),
        (
            "layers, hidden, heads, key/value heads, ffn",
            f"{model.layers}, {model.hidden}, {model.heads}, {model.kv_heads}, {model.ffn}",
        ),
        *([("options", words)] if (words := "; ".join(option_words(model))) else []),
        *([("loops", _loops(model))] if model.loops > 1 else []),
        ("window", f"{config.data.sequence_length:,} tokens, pauses included"),
        ("optimizer steps", f"{step:,} of {config.batch.global_size:,} windows"),
        ("raw tokens seen", f"{progress.get('tokens', 0):,}"),
        ("text tokens seen", f"{progress.get('text_tokens', 0):,}"),
        ("pauses in pretraining", f"{pause['rate']:g} of the window, window `{config.pause.window}`"),
        ("realised pause rate", "not recorded" if realised is None else f"{realised:.4%} of the input tokens"),
        ("placement", _placement(config)),
        *([("objective", _objective(config.objective))] if config.objective.changed else []),
        *([("pauses within answers", within)] if (within := _within(pause)) else []),
        *([("pause positions", "`shared`: those of the text before them")] if "positions" in pause else []),
        ("pause embeddings", f"{config.pause.embeddings} (ids {pause['ids']})"),
        ("pause softmax", f"`{config.pause.softmax}`"),
        ("prefix attention", f"`{pause['prefix_attention']}`"),
        ("M_ft", "none: not finetuned with pauses" if pause["m_ft"] is None else str(pause["m_ft"])),
    ]
    if config.model.from_:
        rows.append(("initial weights", f"`{config.model.from_}`"))
    if config.task.name is not None:
        how = f"{config.finetune.pauses} pauses an example, `{pause['location']}`"
        filler = "" if pause["filler"] is None else f", filler {pause['filler']!r} in place of the pauses"
        rows.append(("finetuned on", f"`{config.task.name}`: {how}{filler}{_answers(config)}"))
    if config.train.only:
        rows.append(("trained", f"`{config.train.only}` only"))
    return rows


def _placement(config: ResolvedConfig) -> str:
    """Return where a pretraining had pauses."""
    pause = config.pause
    pattern = f" {pause.pattern!r}" if pause.pattern is not None and pause.placement in BY_PATTERN else ""
    return f"`{pause.placement}`{pattern}" + ("" if pause.run == 1 else f", runs of {pause.run}")


def _answers(config: ResolvedConfig) -> str:
    """Return where the answers of the finetuning had pauses within them; "" for nowhere."""
    placement, pause = config.finetune.answer_placement, config.pause
    if placement is None:
        return ""
    if placement == "every":
        return f"; within answers {pause.run} after every token"
    pattern = "" if pause.pattern is None or placement not in BY_PATTERN else f" {pause.pattern!r}"
    in_runs = f", {pause.run} at each place" if pause.run > 1 else ""
    return f"; within answers {config.finetune.answer_rate:g} of the tokens{in_runs}, `{placement}`{pattern}"


def _not_decoded(config: ResolvedConfig, pause: Mapping[str, Any]) -> str | None:
    """Return the placement of training that chose places within texts which generation cannot have; None without."""
    pretrained = config.task.name is None and pause["rate"] and config.pause.placement in ("before", "scored")
    return config.pause.placement if pretrained else pause.get("answer_placement")


def _objective(objective: ObjectiveSection) -> str:
    """Return the objective with the keys that differ from their defaults."""
    return ", ".join(f"`{value}`" if name == "name" else f"{name} {value}" for name, value in objective.changed.items())


def _loops(model: ResolvedModel) -> str:
    looped = model.looped
    which = f"{model.layers} layers"
    if model.loop_layers is not None:
        which = f"layers {looped.start} to {looped.stop - 1} of {model.layers} (counted from 0)"
    return f"{model.loops} times through {which} with the same weights, here {model.depth} layers whose weights repeat"


def option_words(model: ResolvedModel) -> list[str]:
    """Return what sets a model apart from a plain Llama, in words.

    Args:
        model: Resolved sizes and options.
    """
    found = []
    if model.head_dim is not None:
        found.append(f"heads of {model.head_dim} channels")
    biases = [("queries, keys and values", model.qkv_bias), ("the attention's output", model.proj_bias)]
    biases.append(("the feed-forward layer", model.mlp_bias))
    if places := [place for place, has in biases if has]:
        found.append(f"biases on {', '.join(places)}")
    if model.qk_norm is not None:
        over = "the channels of each head" if model.qk_norm == "head" else "all heads together"
        found.append(f"RMSNorm of queries and keys over {over}")
    if model.norm == "post":
        found.append("RMSNorm of the outputs of a layer's two parts, not of their inputs")
    if model.sliding_window is not None:
        layers = f" from layer {model.sliding_from} on (counted from 0)" if model.sliding_from else ""
        found.append(f"a sliding window of {model.sliding_window:,} tokens{layers}")
    if model.rope_scaling is not None:
        kind = {"linear": "linearly", "llama3": "as in Llama 3.1", "yarn": "by YaRN"}[model.rope_scaling]
        before = "" if model.rope_original_length is None else f", from a window of {model.rope_original_length:,}"
        found.append(f"rotary angles rescaled {kind} by {model.rope_factor:g}{before}")
    return found


def _table(rows: list[tuple[str, str]]) -> str:
    return (
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows)])
        + "\n"
    )


def _notes(config: ResolvedConfig, pause: Mapping[str, Any]) -> str:
    notes = []
    if pause["m_ft"] is None and _appended(pause):
        notes.append(
            f"The example appends {DEFAULT_PAUSES} pauses. A model that was not finetuned with pauses need not gain "
            "from them: compare with none."
        )
    if "after" in pause.get("decoding", {}):
        notes.append("Generation has pauses after each token of the pattern; training drew some of these, at its rate.")
    if (placement := _not_decoded(config, pause)) is not None:
        notes.append(
            f"Training placed pauses by `{placement}`, which no decoding does: without an option of its own "
            "(`--pause-entropy` and others), generation puts none within answers."
        )
    if config.pause.softmax == "exclude":
        notes.append(
            "The pause logits took no part in the softmax of training, so they mean nothing. Losses and "
            "probabilities computed from this folder must leave these columns out; in generation the suppression in "
            "`generation_config.json` does just that."
        )
    if len(pause["ids"]) > 1:
        notes.append(
            f"The model has {len(pause['ids'])} pause vectors, which were used in turn within a run of pauses: "
            f"{' '.join(pause['tokens'])}. Use them in this order too."
        )
    return "\n".join(["## Notes\n", *(f"- {note}" for note in notes)]) + "\n" if notes else ""
