"""Rules about the sizes and options of the model, and what tensor parallelism divides."""

from __future__ import annotations

from collections.abc import Callable

from pause_megatron.config.families import FAMILIES, families_of
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import ConfigError

Broken = tuple[tuple[str, ...], str] | None
"""The keys of a broken rule and what is expected of them; None where the rule holds."""

Rule = Callable[[ResolvedConfig], Broken]


def heads_divide_hidden(config: ResolvedConfig) -> Broken:
    """Check that heads have a whole number of channels, which rotary embedding can pair."""
    model = config.model
    if model.head_dim is not None:
        odd = model.head_dim % 2
        return (
            (("model.head_dim",), "an even head size, for rotary embedding rotates pairs of channels") if odd else None
        )
    if model.hidden % model.heads:
        return ("model.hidden", "model.heads"), "model.hidden to be a multiple of model.heads, or a model.head_dim"
    if model.channels % 2:
        keys = ("model.hidden", "model.heads")
        return (
            keys,
            "an even head size (model.hidden / model.heads), for rotary embedding rotates pairs of channels",
        )
    return None


def kv_heads_divide_heads(config: ResolvedConfig) -> Broken:
    """Check that query heads share key/value heads evenly."""
    if config.model.heads % config.model.kv_heads:
        return ("model.heads", "model.kv_heads"), "model.heads to be a multiple of model.kv_heads"
    return None


def tensor_divides_the_model(config: ResolvedConfig) -> Broken:
    """Check that tensor parallelism divides heads and feed-forward width, and shares key/value heads evenly."""
    model, ranks = config.model, config.parallel.tensor
    for name in ("heads", "ffn"):
        if getattr(model, name) % ranks:
            return (f"model.{name}", "parallel.tensor"), f"model.{name} to be a multiple of parallel.tensor"
    shared = ("model.kv_heads", "parallel.tensor")
    if model.kv_heads % ranks and ranks % model.kv_heads:
        return shared, "model.kv_heads to be a multiple or a divisor of parallel.tensor"
    if (model.query_width + 2 * model.kv_width) % ranks:
        return shared, "the rows of queries, keys and values to be a multiple of parallel.tensor"
    return None


def a_family_has_the_options(config: ResolvedConfig) -> Broken:
    """Check that some family of transformers has all options of the model, so that it can be exported."""
    model = config.model
    if model.family is not None and (lacking := FAMILIES[model.family].lacks(model)):
        keys = ("model.family", *(f"model.{name}" for name in lacking))
        return keys, f"options that {FAMILIES[model.family].title} has, or model.family=null"
    if families_of(model):
        return None
    options = ("head_dim", "qk_norm", "norm", "qkv_bias", "proj_bias", "mlp_bias", "sliding_window", "sliding_from")
    titles = ", ".join(each.title for each in FAMILIES.values())
    return tuple(f"model.{name}" for name in options), f"the options of one family ({titles})"


def biases_come_together(config: ResolvedConfig) -> Broken:
    """Check that a bias on the attention's output has those on queries, keys and values beside it."""
    if config.model.proj_bias and not config.model.qkv_bias:
        return ("model.proj_bias", "model.qkv_bias"), "model.qkv_bias=true with model.proj_bias"
    return None


def rope_scaling_is_whole(config: ResolvedConfig) -> Broken:
    """Check that the rescaling of rotary angles has its settings, and no rescaling has none."""
    model = config.model
    if model.rope_scaling is None:
        if model.rope_factor != 1.0 or model.rope_original_length is not None:
            keys = ("model.rope_scaling", "model.rope_factor", "model.rope_original_length")
            return keys, "a model.rope_scaling with its factor or original length"
        return None
    if model.rope_scaling != "linear" and model.rope_original_length is None:
        return (
            "model.rope_scaling",
            "model.rope_original_length",
        ), f"model.rope_original_length with {model.rope_scaling}"
    for low, high, kind in (
        ("rope_low_freq", "rope_high_freq", "llama3"),
        ("rope_beta_slow", "rope_beta_fast", "yarn"),
    ):
        if model.rope_scaling == kind and getattr(model, low) >= getattr(model, high):
            return (f"model.{low}", f"model.{high}"), f"model.{low} below model.{high}"
    return None


def options_need_torch_attention(config: ResolvedConfig) -> Broken:
    """Check that the layers of Transformer Engine are not asked for options that only the layers of `sdpa` have."""
    model = config.model
    options = {"qk_norm": model.qk_norm, "norm": model.norm == "post", "sliding_window": model.sliding_window}
    options |= {"proj_bias": model.proj_bias, "mlp_bias": model.mlp_bias}
    given = [f"model.{name}" for name, value in options.items() if value]
    if model.attention == "te" and given:
        return ("model.attention", *given), f"model.attention=sdpa with {', '.join(given)}"
    return None


def shared_positions_need_torch_attention(config: ResolvedConfig) -> Broken:
    """Check that pauses without positions of their own use an attention core that was tested with them."""
    if config.pause.positions == "shared" and config.model.attention == "te":
        return ("model.attention", "pause.positions"), "model.attention=sdpa with pause.positions=shared"
    return None


def sliding_layers_exist(config: ResolvedConfig) -> Broken:
    """Check that a sliding window has a layer."""
    model = config.model
    if model.sliding_from and (model.sliding_window is None or model.sliding_from >= model.layers):
        keys = ("model.sliding_window", "model.sliding_from", "model.layers")
        return keys, "a model.sliding_window with model.sliding_from, which is below model.layers"
    try:
        looped = model.looped
    except ConfigError:
        return None  # another rule says so
    if model.loops > 1 and looped.start < model.sliding_from < looped.stop:
        keys = ("model.sliding_from", "model.loops", "model.loop_layers")
        return keys, "looped layers on one side of model.sliding_from, as no export has windows in another order"
    return None


def looped_layers_exist(config: ResolvedConfig) -> Broken:
    """Check that a range of looped layers is one of the model's, and that it loops."""
    model = config.model
    try:
        _ = model.looped
    except ConfigError:
        return ("model.loop_layers", "model.layers"), f"null, or a range LOW..HIGH within 0..{model.layers - 1}"
    if model.loop_layers is not None and model.loops == 1:
        return ("model.loop_layers", "model.loops"), "model.loops above 1 with model.loop_layers"
    return None


MODEL_RULES: tuple[Rule, ...] = (
    *(heads_divide_hidden, kv_heads_divide_heads, tensor_divides_the_model),
    *(biases_come_together, a_family_has_the_options, rope_scaling_is_whole, sliding_layers_exist),
    *(options_need_torch_attention, shared_positions_need_torch_attention, looped_layers_exist),
)
