"""The arithmetic of a run as a table: batch, tokens, pauses, parameters, FLOPs. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pause_megatron.config.batching import BatchPlan
from pause_megatron.config.lora import trained_parameters
from pause_megatron.config.model_from import SHAPE
from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.config.presets import VOCABULARIES, parameters, step_flops
from pause_megatron.config.quantities import scaled
from pause_megatron.config.schema import ResolvedConfig

if TYPE_CHECKING:
    from pause_megatron.data.supervised.windows import EpochSummary
    from pause_megatron.train.inputs.task_data import TaskData

ASSUMED_VOCABULARY = 32_000


def describe(config: ResolvedConfig, plan: BatchPlan, engine: dict[str, Any], *, vocab_size: int | None = None) -> str:
    """Return the arithmetic of a pretraining run as aligned lines of "name value unit".

    Args:
        config: Configuration of the run.
        plan: Its batches.
        engine: Its DeepSpeed configuration.
        vocab_size: Text tokens; None: those in the manifest of the first corpus, else 32000.
    """
    text_size, origin = text_vocabulary(config, vocab_size)
    rows = [
        *_batch_rows(plan),
        ("window", f"{plan.sequence_length:,} tokens, {plan.pauses:,} pauses inserted ({_window(config)})"),
        ("pause fraction", f"{plan.pause_fraction:.2%} of the input tokens (expected)"),
        ("raw tokens a step", f"{plan.raw_tokens:,}"),
        ("text tokens a step", f"{plan.text_tokens:,.0f} (expected)"),
        ("steps", _steps(config, plan)),
        ("raw tokens in all", _total(plan.total_tokens)),
        ("text tokens in all", _total(plan.steps and plan.steps * plan.text_tokens)),
        ("learning rate", _schedule(config)),
        *_objective_rows(config),
        *_model_rows(config, plan, engine, text_size, origin),
        *(("not there", f"{prefix} ({key})") for key, prefix in missing_corpora(config)),
    ]
    return _table(rows)


def describe_task(data: TaskData, plan: BatchPlan, engine: dict[str, Any]) -> str:
    """Return the arithmetic of a finetuning run as aligned lines of "name value unit".

    Args:
        data: Its examples.
        plan: Its batches.
        engine: Its DeepSpeed configuration.
    """
    from pause_megatron.data.supervised.windows import summarize

    config, facts, arrangement = data.config, summarize(data.windows), data.windows.arrangement
    steps, length = config.train.steps - (config.train.extended_from or 0), arrangement.sequence_length
    plan = replace(plan, steps=steps)
    epochs = steps * plan.global_size / facts.windows
    finetune = config.finetune
    pauses = "pauses" if finetune.filler is None else f"fillers {finetune.filler!r}"
    rows = [
        *_batch_rows(plan),
        ("task", f"{config.task.name}: {facts.examples:,} examples, {facts.truncated:,} prompts cut on the left"),
        (
            "window",
            f"{length:,} tokens, {config.finetune.batching}: {facts.examples / facts.windows:.2f} examples each",
        ),
        ("windows an epoch", f"{facts.windows:,}, {facts.padding:.2%} padding"),
        (
            "pauses",
            f"{config.finetune.pauses} {pauses} an example, {config.finetune.location}; {facts.pauses:,} an epoch",
        ),
        *([("in the answers", _in_answers(config, facts))] if arrangement.answers else []),
        ("prefix attention", config.finetune.prefix_attention),
        (
            "tokens an epoch",
            f"{facts.tokens:,} read ({facts.pauses / facts.tokens:.2%} pauses), {facts.targets:,} targets",
        ),
        *([("hints an epoch", f"{facts.hints:,}, weight {finetune.hint_weight:g}")] if arrangement.hints else []),
        ("steps", f"{steps:,}, about {epochs:.2f} epochs (by the first one's windows)"),
        ("learning rate", _schedule(config)),
        *_objective_rows(config),
        *_model_rows(config, plan, engine, data.tokenizer.vocab_size, "the tokenizer's"),
    ]
    return _table(rows)


def _in_answers(config: ResolvedConfig, facts: EpochSummary) -> str:
    share = facts.pauses_in_answers / facts.targets
    return f"{facts.pauses_in_answers:,} an epoch, {share:.2f} a target ({config.finetune.answer_placement})"


def _batch_rows(plan: BatchPlan) -> list[tuple[str, str]]:
    return [
        ("ranks", f"{plan.world_size} = {plan.data_parallel} data parallel x {plan.tensor} tensor parallel"),
        (
            "global batch",
            f"{plan.global_size} windows = {plan.micro_size} micro x {plan.accumulation} accumulation "
            f"x {plan.data_parallel} data parallel",
        ),
    ]


def _model_rows(
    config: ResolvedConfig, plan: BatchPlan, engine: dict[str, Any], text_size: int, origin: str
) -> list[tuple[str, str]]:
    """Return the rows about vocabulary, model and FLOPs, which are those of full windows, padding included."""
    size, model = text_size + config.pause.embeddings, config.model
    which = "" if model.loop_layers is None else f", {model.loop_layers}"
    loops = f"{which} run {model.loops} times (depth {model.depth})" if model.loops > 1 else ""
    trained = trained_parameters(config)
    kept = "" if model.from_ else "; a new run needs model.from"
    flops = step_flops(model, size, plan.sequence_length, tokens=plan.raw_tokens, targets=plan.targets)
    return [
        ("vocabulary", f"{size:,} = {text_size:,} text ({origin}) + {config.pause.embeddings} pause"),
        (
            "model",
            f"{model.layers} layers{loops} x {model.hidden} hidden, {model.heads} heads, "
            f"{model.kv_heads} key/value heads, {model.ffn} ffn, {'tied' if model.tied else 'untied'}",
        ),
        *([("model options", options)] if (options := _model_options(model)) else []),
        ("parameters", f"{parameters(model, size):,}"),
        *([] if trained is None else [("trained", f"{trained:,} ({config.train.only}){kept}")]),
        ("FLOPs a step", f"{scaled(flops)}FLOP ({scaled(flops / plan.world_size)}FLOP a rank)"),
        ("FLOPs in all", "unknown" if plan.steps is None else f"{scaled(flops * plan.steps)}FLOP"),
        ("engine", f"ZeRO stage {engine['zero_optimization']['stage']}, {config.engine.precision}"),
    ]


def _objective_rows(config: ResolvedConfig) -> list[tuple[str, str]]:
    """Return a row about what is minimized, where it is not the mean cross-entropy: keys that are not at their default.

    Args:
        config: Configuration of the run.
    """
    changed = config.objective.changed
    return [("objective", ", ".join(f"{key}={value}" for key, value in changed.items()))] if changed else []


def _model_options(model: ResolvedModel) -> str:
    """Return the options of the model that are not at their default, as `key=value`; without loops, which are shown."""
    shown = ("layers", "hidden", "heads", "kv_heads", "ffn", "tied", "loops", "loop_layers")
    names = [name for name in SHAPE if name not in shown]
    fields = type(model).model_fields
    changed = {name: getattr(model, name) for name in names if getattr(model, name) != fields[name].default}
    return ", ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in changed.items()
    )


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _window(config: ResolvedConfig) -> str:
    pause = config.pause
    if not pause.rate:
        return "standard training"
    if pause.placement == "every":
        return f"{pause.run} after every token{_positions(config)}"
    runs = "" if pause.run == 1 else f" in runs of {pause.run}"
    side = "" if config.data.side is None else f" with data.side={config.data.side}"
    lost = "then cut" if pause.window == "trim" else "no text lost"
    return f"rate {pause.rate:g}, {pause.placement}{side}{runs}, {lost}{_positions(config)}"


def _positions(config: ResolvedConfig) -> str:
    return ", shared positions" if config.pause.positions == "shared" else ""


def _steps(config: ResolvedConfig, plan: BatchPlan) -> str:
    if plan.steps is None:
        return "unknown: give train.steps or train.tokens"
    if (extended := config.train.extended_from) is not None:
        return f"{plan.steps:,} after the {extended:,} of the finished run, to step {config.train.steps:,}"
    return f"{plan.steps:,} for a budget of {config.train.tokens:,} raw tokens"


def _schedule(config: ResolvedConfig) -> str:
    optim = config.optim
    after = "constant" if optim.schedule == "constant" else f"{optim.schedule} to {optim.min_lr_fraction:.0%}"
    if config.train.extended_from is not None and optim.schedule == "constant":
        return f"{optim.lr:g}, constant"
    return f"{optim.lr:g} after {optim.warmup_steps:,} steps of warm-up, then {after}"


def _total(tokens: float | None) -> str:
    return "unknown" if tokens is None else f"{tokens:,.0f} ({scaled(tokens)}tokens)"


def text_vocabulary(config: ResolvedConfig, given: int | None) -> tuple[int, str]:
    """Return the number of text tokens and its source: given, the first corpus's manifest, the preset, or assumed.

    Args:
        config: Configuration of the run.
        given: The number that the user gave; None: look for it.
    """
    if given is not None:
        return given, "--vocab-size"
    for prefix in config.data.prefix:  # in a blend, weights are listed between the prefixes
        manifest = Path(f"{prefix}.manifest.json")
        if manifest.is_file():
            try:
                tokenizer = json.loads(manifest.read_text(encoding="utf-8"))["tokenizer"]
                size = int(tokenizer["vocab_size"])
                pause = int(tokenizer.get("pause_id", size))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # the run itself reports a malformed manifest
            # An imported tokenizer has its pauses among its ids.
            return size - config.pause.embeddings if pause < size else size, str(manifest)
    preset = config.model.preset or ""
    return (VOCABULARIES[preset], f"{preset}'s") if preset in VOCABULARIES else (ASSUMED_VOCABULARY, "assumed")


def missing_corpora(config: ResolvedConfig) -> list[tuple[str, str]]:
    """Return (key, path) of each corpus and side array that is missing on this host: no error, a run may be elsewhere.

    Args:
        config: Configuration of the run.
    """
    given = (("data.prefix", config.data.prefix), ("data.valid_prefix", config.data.valid_prefix))
    prefixes = [(key, word) for key, words in given for word in words if not _is_weight(word)]
    missing = [each for each in prefixes if not Path(f"{each[1]}.manifest.json").is_file()]
    sides = [f"{each[1]}.{config.data.side}.npy" for each in prefixes if config.data.side and each not in missing]
    return missing + [("data.side", path) for path in sides if not Path(path).is_file()]


def _is_weight(word: str) -> bool:
    try:
        return float(word) > 0
    except ValueError:
        return False
