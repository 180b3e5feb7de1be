"""Rules about several configuration keys at once, each a function; all are checked after defaults are filled in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pause_megatron.config.answer_rules import ANSWER_RULES
from pause_megatron.config.batching import added_steps, pause_range
from pause_megatron.config.lora_rules import LORA_RULES
from pause_megatron.config.model_rules import MODEL_RULES, Broken, Rule
from pause_megatron.config.model_schema import ModelSection, ResolvedModel
from pause_megatron.config.objective_rules import OBJECTIVE_RULES
from pause_megatron.config.placement_rules import PLACEMENT_RULES
from pause_megatron.config.schema import ParallelSection, ResolvedConfig, ResolvedData
from pause_megatron.errors import ConfigError

RULES: list[Rule] = [*MODEL_RULES, *LORA_RULES, *PLACEMENT_RULES, *OBJECTIVE_RULES, *ANSWER_RULES]


def _rule(function: Rule) -> Rule:
    RULES.append(function)
    return function


def check(config: ResolvedConfig, origin: Mapping[str, str] | None = None) -> None:
    """Check every rule.

    Args:
        config: Resolved configuration.
        origin: "FILE:LINE" or "command line" of each key that was given, for the message.

    Raises:
        ConfigError: A rule is broken; one line a rule with the values it got and where they were written.
    """
    _refuse_broken(config, RULES, origin or {})


def check_shape(model: ModelSection, parallel: ParallelSection, sequence_length: int) -> ResolvedModel:
    """Check the rules about sizes, for a model that is built without a whole configuration.

    Args:
        model: Model section with every size given.
        parallel: Tensor and sequence parallelism.
        sequence_length: Tokens of a window.

    Returns:
        The sizes, none of them None.

    Raises:
        ConfigError: A size is missing, or a rule is broken.
    """
    missing = [
        name for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "tied") if getattr(model, name) is None
    ]
    if missing:
        keys = ", ".join(f"model.{name}" for name in missing)
        raise ConfigError(f"{keys}: expected a value, got null; give it, or a model.preset")
    resolved = ResolvedModel(**model.model_dump())
    data = ResolvedData(sequence_length=sequence_length, split="1,0,0")
    _refuse_broken(ResolvedConfig(model=resolved, parallel=parallel, data=data), SHAPE_RULES, None)
    return resolved


def _refuse_broken(config: ResolvedConfig, rules: Iterable[Rule], origin: Mapping[str, str] | None) -> None:
    broken = [found for rule in rules if (found := rule(config)) is not None]
    if broken:
        raise ConfigError("\n".join(_message(config, keys, expected, origin) for keys, expected in broken))


def _message(config: ResolvedConfig, keys: tuple[str, ...], expected: str, origin: Mapping[str, str] | None) -> str:
    values = []
    for key in keys:
        section, name = key.split(".")
        where = "" if origin is None else f" ({origin.get(key, 'default')})"
        values.append(f"{key}={getattr(getattr(config, section), name)}{where}")
    return f"expected {expected}; got {', '.join(values)}"


@_rule
def sequence_needs_tensor(config: ResolvedConfig) -> Broken:
    """Check that sequence parallelism has tensor-parallel ranks to split over."""
    if config.parallel.sequence and config.parallel.tensor == 1:
        keys = ("parallel.sequence", "parallel.tensor")
        return keys, "parallel.tensor > 1 with parallel.sequence (the tensor-parallel ranks share the sequence)"
    return None


@_rule
def tensor_divides_the_sequence(config: ResolvedConfig) -> Broken:
    """Check that sequence parallelism divides the window."""
    if config.parallel.sequence and config.data.sequence_length % config.parallel.tensor:
        keys = ("data.sequence_length", "parallel.tensor")
        return keys, "data.sequence_length to be a multiple of parallel.tensor with parallel.sequence"
    return None


SHAPE_RULES = (*MODEL_RULES, sequence_needs_tensor, tensor_divides_the_sequence)


@_rule
def micro_divides_global(config: ResolvedConfig) -> Broken:
    """Check that the micro-batch divides the global batch."""
    if config.batch.global_size % config.batch.micro_size:
        return ("batch.global_size", "batch.micro_size"), "batch.global_size to be a multiple of batch.micro_size"
    return None


@_rule
def steps_and_tokens_agree(config: ResolvedConfig) -> Broken:
    """Check that steps and tokens, where both are given, describe the same run."""
    steps, tokens = config.train.steps, config.train.tokens
    per_step = config.batch.global_size * config.data.sequence_length
    if steps is not None and tokens is not None and steps != -(-tokens // per_step):
        keys = ("train.steps", "train.tokens", "batch.global_size", "data.sequence_length")
        contradict = f"with {per_step} tokens a step they contradict; give the one to keep"
        return keys, f"only one of train.steps and train.tokens ({contradict})"
    return None


@_rule
def an_extension_adds_steps(config: ResolvedConfig) -> Broken:
    """Check that an extended run is longer than the run it extends."""
    added = added_steps(config)
    if config.train.extended_from is not None and added is not None and added < 1:
        keys = ("train.steps", "train.extended_from")
        return keys, "train.steps > train.extended_from (the step at which the finished run ended)"
    return None


@_rule
def warmup_ends(config: ResolvedConfig) -> Broken:
    """Check that warm-up and decay end within the run."""
    steps, optim, extended = added_steps(config), config.optim, config.train.extended_from is not None
    if steps is None or steps < 1 or (extended and optim.schedule == "constant"):  # no second warm-up
        return None
    lengths = ("train.steps", "train.extended_from") if extended else ("train.steps",)
    length = "train.steps - train.extended_from" if extended else "train.steps"
    if optim.warmup_steps and optim.warmup_steps >= steps:
        return ("optim.warmup_steps", *lengths), f"optim.warmup_steps < {length}"
    if optim.schedule == "wsd" and optim.warmup_steps > steps * (1 - optim.decay_fraction):
        keys = ("optim.warmup_steps", "optim.decay_fraction", *lengths)
        share = f"({length})" if extended else length
        return keys, f"warm-up and decay (optim.decay_fraction x {share}) to fit into {length}"
    return None


def _shares(split: str) -> list[float]:
    """Return the numbers of `data.split`; none where one of them is not a number."""
    try:
        return [float(share) for share in split.split(",")]
    except ValueError:
        return []


@_rule
def finetune_pauses_can_be_counted(config: ResolvedConfig) -> Broken:
    """Check that `finetune.pauses` is a number or a range."""
    try:
        pause_range(config.finetune.pauses)
    except ConfigError:
        return ("finetune.pauses",), "a whole number of pauses, or a range LOW..HIGH such as 0..50"
    return None


@_rule
def epochs_are_of_a_task(config: ResolvedConfig) -> Broken:
    """Check that epochs are given for a finetuning only."""
    if config.finetune.epochs is not None and config.task.name is None:
        return ("finetune.epochs", "task.name"), "task.name with finetune.epochs; pretraining counts train.steps"
    return None


@_rule
def hints_have_one_place(config: ResolvedConfig) -> Broken:
    """Check that hints are of a finetuning, and are predicted by pauses or by heads."""
    finetune = config.finetune
    if finetune.pause_targets and finetune.auxiliary_heads:
        keys = ("finetune.pause_targets", "finetune.auxiliary_heads")
        return keys, "only one of finetune.pause_targets and finetune.auxiliary_heads"
    for key in ("pause_targets", "auxiliary_heads"):
        if getattr(finetune, key) and config.task.name is None:
            return (f"finetune.{key}", "task.name"), f"task.name with finetune.{key}; hints are of a task's examples"
    return None


@_rule
def pause_targets_need_appended_pauses(config: ResolvedConfig) -> Broken:
    """Check that a pause after the prompt is there for a hint, beside the last one, which predicts the answer."""
    finetune = config.finetune
    if not finetune.pause_targets:
        return None
    if finetune.location != "append":
        keys = ("finetune.location", "finetune.pause_targets")
        return keys, "finetune.location=append with finetune.pause_targets; a prepended pause does not see the prompt"
    try:
        fewest = pause_range(finetune.pauses)[0]
    except ConfigError:
        return None  # another rule says so
    if fewest < 2:
        keys = ("finetune.pauses", "finetune.pause_targets")
        return keys, "at least 2 finetune.pauses with finetune.pause_targets (the last one predicts the answer)"
    return None


@_rule
def auxiliary_heads_are_trained(config: ResolvedConfig) -> Broken:
    """Check that the heads are not frozen."""
    if config.finetune.auxiliary_heads and config.train.only is not None:
        keys = ("train.only", "finetune.auxiliary_heads")
        return keys, "train.only=null with finetune.auxiliary_heads, whose heads are trained"
    return None


@_rule
def masks_need_torch_attention(config: ResolvedConfig) -> Broken:
    """Check that packed examples and a bidirectional prefix use an attention core that can mask."""
    finetune = config.finetune
    masked = finetune.batching == "packed" or finetune.prefix_attention == "bidirectional"
    if config.task.name is not None and config.model.attention == "te" and masked:
        keys = ("model.attention", "finetune.batching", "finetune.prefix_attention")
        return keys, "model.attention=sdpa with packed examples or a bidirectional prefix"
    return None


@_rule
def prefixes_fit_the_sliding_window(config: ResolvedConfig) -> Broken:
    """Check that no prefix that attends in both directions is cut by a sliding window: inference has no such mask."""
    model, finetune = config.model, config.finetune
    if config.task.name is None or finetune.prefix_attention != "bidirectional" or model.sliding_window is None:
        return None
    if model.sliding_window < config.data.sequence_length:
        keys = ("finetune.prefix_attention", "model.sliding_window", "data.sequence_length")
        return keys, "data.sequence_length up to model.sliding_window with a bidirectional prefix, or a causal one"
    return None


@_rule
def intra_document_masking_needs_torch_attention(config: ResolvedConfig) -> Broken:
    """Check that intra-document masking uses an attention core with support for it."""
    if config.task.name is None and config.model.attention == "te" and config.data.intra_document_masking:
        keys = ("model.attention", "data.intra_document_masking")
        return keys, "model.attention=sdpa with data.intra_document_masking=true"
    return None


@_rule
def split_has_shares(config: ResolvedConfig) -> Broken:
    """Check that `data.split` has three shares, and validation data where validation is on."""
    shares = _shares(config.data.split)
    if len(shares) != 3 or not all(0 <= share < float("inf") for share in shares) or shares[0] == 0:
        return ("data.split",), "three shares 'TRAIN,VALID,TEST', none negative, TRAIN > 0 (for example 99,1,0)"
    if config.data.valid_prefix:
        return None
    if config.validation.every and shares[1] == 0:
        keys = ("data.split", "validation.every")
        return keys, "a validation share > 0 in data.split, corpora in data.valid_prefix, or validation.every=0"
    return None


@_rule
def all_of_the_corpus_trains(config: ResolvedConfig) -> Broken:
    """Check that no documents are held out where `data.valid_prefix` validates."""
    if config.data.valid_prefix and any(_shares(config.data.split)[1:]):
        keys = ("data.split", "data.valid_prefix")
        return keys, "data.split=1,0,0 (or none) with data.valid_prefix: the whole of data.prefix trains"
    return None


@_rule
def text_has_one_source(config: ResolvedConfig) -> Broken:
    """Check that text comes from a corpus or a stream."""
    if config.data.prefix and config.data.source:
        return ("data.prefix", "data.source"), "data.prefix (a prepared corpus) or data.source (a stream), not both"
    return None


@_rule
def a_stream_needs_a_tokenizer(config: ResolvedConfig) -> Broken:
    """Check that a stream has a tokenizer."""
    if config.data.source and config.data.tokenizer is None:
        return ("data.tokenizer", "data.source"), "the path of a tokenizer in data.tokenizer with data.source"
    return None


@_rule
def a_stream_holds_nothing_out(config: ResolvedConfig) -> Broken:
    """Check that a streaming run validates on a prepared corpus."""
    if config.data.source and config.validation.every and not config.data.valid_prefix:
        keys = ("data.valid_prefix", "validation.every")
        return keys, "a prepared corpus in data.valid_prefix, or validation.every=0, with data.source"
    return None


@_rule
def run_dir_is_named(config: ResolvedConfig) -> Broken:
    """Check that the run folder has a name."""
    return None if config.run.dir.strip() else (("run.dir",), "the name of a folder")
