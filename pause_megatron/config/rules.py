"""Rules that tie keys together. Each is a function with a message; all are checked once, after resolution."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from pause_megatron.config.batching import added_steps, pause_range, pauses_per_window
from pause_megatron.config.schema import ModelSection, ParallelSection, ResolvedConfig, ResolvedData, ResolvedModel
from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError

# A broken rule names the keys it is about and what was expected of them; None: the rule holds.
Broken = tuple[tuple[str, ...], str] | None
Rule = Callable[[ResolvedConfig], Broken]

PLACEMENTS = ("uniform", "isolated", "with_replacement", "bernoulli", "interval")
_RULES: list[Rule] = []


def _rule(function: Rule) -> Rule:
    _RULES.append(function)
    return function


def check(config: ResolvedConfig, origin: Mapping[str, str] | None = None) -> None:
    """Check every rule.

    Args:
        config: resolved. origin: where a key was written ("FILE:LINE", "command line"), for the message.

    Raises:
        ConfigError: one line per broken rule: what was expected, what came, and where it came from.
    """
    _refuse_broken(config, _RULES, origin or {})


def check_shape(model: ModelSection, parallel: ParallelSection, sequence_length: int) -> ResolvedModel:
    """Check the rules about sizes alone, for a model that is built without a whole configuration.

    Returns:
        the sizes, all of them known.

    Raises:
        ConfigError: a size is missing, or one line per broken rule.
    """
    missing = [
        name for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "tied") if getattr(model, name) is None
    ]
    if missing:
        keys = ", ".join(f"model.{name}" for name in missing)
        raise ConfigError(f"{keys}: expected a value, came null; give it, or a model.preset")
    resolved = ResolvedModel(**model.model_dump())
    data = ResolvedData(sequence_length=sequence_length, split="1,0,0")
    _refuse_broken(ResolvedConfig(model=resolved, parallel=parallel, data=data), _SHAPE_RULES, None)
    return resolved


def _refuse_broken(config: ResolvedConfig, rules: Iterable[Rule], origin: Mapping[str, str] | None) -> None:
    broken = [found for rule in rules if (found := rule(config)) is not None]
    if broken:
        raise ConfigError("\n".join(_message(config, keys, expected, origin) for keys, expected in broken))


def _message(config: ResolvedConfig, keys: tuple[str, ...], expected: str, origin: Mapping[str, str] | None) -> str:
    came = []
    for key in keys:
        section, name = key.split(".")
        where = "" if origin is None else f" ({origin.get(key, 'default')})"
        came.append(f"{key}={getattr(getattr(config, section), name)}{where}")
    return f"expected {expected}; came {', '.join(came)}"


@_rule
def heads_divide_hidden(config: ResolvedConfig) -> Broken:
    model = config.model
    if model.hidden % model.heads:
        return ("model.hidden", "model.heads"), "model.hidden to be a multiple of model.heads"
    if model.hidden // model.heads % 2:
        keys = ("model.hidden", "model.heads")
        return keys, "an even head size (model.hidden / model.heads), because rotary positions turn pairs"
    return None


@_rule
def kv_heads_divide_heads(config: ResolvedConfig) -> Broken:
    if config.model.heads % config.model.kv_heads:
        return ("model.heads", "model.kv_heads"), "model.heads to be a multiple of model.kv_heads"
    return None


@_rule
def tensor_divides_the_model(config: ResolvedConfig) -> Broken:
    for name in ("heads", "kv_heads", "ffn"):
        if getattr(config.model, name) % config.parallel.tensor:
            return (f"model.{name}", "parallel.tensor"), f"model.{name} to be a multiple of parallel.tensor"
    return None


@_rule
def sequence_needs_tensor(config: ResolvedConfig) -> Broken:
    if config.parallel.sequence and config.parallel.tensor == 1:
        keys = ("parallel.sequence", "parallel.tensor")
        return keys, "parallel.tensor > 1 with parallel.sequence (the tensor-parallel ranks share the sequence)"
    return None


@_rule
def tensor_divides_the_sequence(config: ResolvedConfig) -> Broken:
    if config.parallel.sequence and config.data.sequence_length % config.parallel.tensor:
        keys = ("data.sequence_length", "parallel.tensor")
        return keys, "data.sequence_length to be a multiple of parallel.tensor with parallel.sequence"
    return None


_SHAPE_RULES = (
    *(heads_divide_hidden, kv_heads_divide_heads, tensor_divides_the_model),
    *(sequence_needs_tensor, tensor_divides_the_sequence),
)


@_rule
def micro_divides_global(config: ResolvedConfig) -> Broken:
    if config.batch.global_size % config.batch.micro_size:
        return ("batch.global_size", "batch.micro_size"), "batch.global_size to be a multiple of batch.micro_size"
    return None


@_rule
def steps_and_tokens_agree(config: ResolvedConfig) -> Broken:
    steps, tokens = config.train.steps, config.train.tokens
    per_step = config.batch.global_size * config.data.sequence_length
    if steps is not None and tokens is not None and steps != -(-tokens // per_step):
        keys = ("train.steps", "train.tokens", "batch.global_size", "data.sequence_length")
        contradict = f"with {per_step} tokens a step they contradict; give the one to keep"
        return keys, f"only one of train.steps and train.tokens ({contradict})"
    return None


@_rule
def an_extension_adds_steps(config: ResolvedConfig) -> Broken:
    added = added_steps(config)
    if config.train.extended_from is not None and added is not None and added < 1:
        keys = ("train.steps", "train.extended_from")
        return keys, "train.steps > train.extended_from (the step at which the finished run ended)"
    return None


@_rule
def warmup_ends(config: ResolvedConfig) -> Broken:
    steps, optim, extended = added_steps(config), config.optim, config.train.extended_from is not None
    if steps is None or steps < 1 or (extended and optim.schedule == "constant"):  # which has no second warm-up
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


@_rule
def placement_is_known(config: ResolvedConfig) -> Broken:
    name = config.pause.placement
    if name not in PLACEMENTS and ":" not in name:
        return ("pause.placement",), f"{', '.join(PLACEMENTS)} or 'module:attribute'{nearest(name, PLACEMENTS)}"
    return None


@_rule
def bernoulli_varies(config: ResolvedConfig) -> Broken:
    if config.pause.placement == "bernoulli" and config.pause.window == "exact" and config.pause.rate > 0:
        keys = ("pause.placement", "pause.window")
        return keys, "pause.window=trim with bernoulli: an exact window needs the same number of pauses every time"
    return None


@_rule
def text_is_left(config: ResolvedConfig) -> Broken:
    length, pause = config.data.sequence_length, config.pause
    pauses = pauses_per_window(pause.rate, length)
    if pause.window == "exact" and length + 1 - pauses < 2:
        keys = ("pause.rate", "data.sequence_length")
        return keys, f"at least 2 text tokens in a window of {length} + 1 tokens with {pauses} pauses"
    return None


@_rule
def isolated_pauses_fit(config: ResolvedConfig) -> Broken:
    length, pause = config.data.sequence_length, config.pause
    pauses = pauses_per_window(pause.rate, length)
    if pause.placement == "isolated" and pause.window == "exact" and pauses > length + 1 - pauses:
        keys = ("pause.rate", "pause.placement")
        return keys, f"no more pauses ({pauses}) than text tokens ({length + 1 - pauses}) to keep them apart"
    return None


def _shares(split: str) -> list[float]:
    """The numbers of data.split; none where one of them is no number."""
    try:
        return [float(share) for share in split.split(",")]
    except ValueError:
        return []


@_rule
def finetune_pauses_can_be_counted(config: ResolvedConfig) -> Broken:
    try:
        pause_range(config.finetune.pauses)
    except ConfigError:
        return ("finetune.pauses",), "a whole number of pauses, or a range LOW..HIGH such as 0..50"
    return None


@_rule
def epochs_are_of_a_task(config: ResolvedConfig) -> Broken:
    if config.finetune.epochs is not None and config.task.name is None:
        return ("finetune.epochs", "task.name"), "task.name with finetune.epochs; pretraining counts train.steps"
    return None


@_rule
def masks_need_torch_attention(config: ResolvedConfig) -> Broken:
    finetune = config.finetune
    masked = finetune.batching == "packed" or finetune.prefix_attention == "bidirectional"
    if config.task.name is not None and config.model.attention == "te" and masked:
        keys = ("model.attention", "finetune.batching", "finetune.prefix_attention")
        return keys, "model.attention=sdpa with packed examples or a bidirectional prefix"
    return None


@_rule
def intra_document_masking_needs_torch_attention(config: ResolvedConfig) -> Broken:
    if config.task.name is None and config.model.attention == "te" and config.data.intra_document_masking:
        keys = ("model.attention", "data.intra_document_masking")
        return keys, "model.attention=sdpa with data.intra_document_masking=true"
    return None


@_rule
def split_has_shares(config: ResolvedConfig) -> Broken:
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
    if config.data.valid_prefix and any(_shares(config.data.split)[1:]):
        keys = ("data.split", "data.valid_prefix")
        return keys, "data.split=1,0,0 (or none) with data.valid_prefix: the whole of data.prefix trains"
    return None


@_rule
def text_has_one_source(config: ResolvedConfig) -> Broken:
    if config.data.prefix and config.data.source:
        return ("data.prefix", "data.source"), "data.prefix (a prepared corpus) or data.source (a stream), not both"
    return None


@_rule
def a_stream_needs_a_tokenizer(config: ResolvedConfig) -> Broken:
    if config.data.source and config.data.tokenizer is None:
        return ("data.tokenizer", "data.source"), "the path of a tokenizer in data.tokenizer with data.source"
    return None


@_rule
def a_stream_holds_nothing_out(config: ResolvedConfig) -> Broken:
    if config.data.source and config.validation.every and not config.data.valid_prefix:
        keys = ("data.valid_prefix", "validation.every")
        return keys, "a prepared corpus in data.valid_prefix, or validation.every=0, with data.source"
    return None


@_rule
def run_dir_is_named(config: ResolvedConfig) -> Broken:
    return None if config.run.dir.strip() else (("run.dir",), "the name of a folder")
