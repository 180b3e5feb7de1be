"""Rules about LoRA adapters: they are described where they are trained, and fit the model."""

from __future__ import annotations

from pause_megatron.config.lora import TARGETS, adapted_layers
from pause_megatron.config.model_rules import Broken, Rule
from pause_megatron.config.model_schema import LoraSection
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import ConfigError


def adapters_are_trained(config: ResolvedConfig) -> Broken:
    """Check that adapters are described only where they are trained, so that no run lacks them unnoticed."""
    changed = [name for name, value in LoraSection() if getattr(config.lora, name) != value]
    if config.train.only != "lora" and changed:
        return (*(f"lora.{name}" for name in changed), "train.only"), "train.only=lora with keys of lora"
    return None


def adapters_fit_the_model(config: ResolvedConfig) -> Broken:
    """Check that targets and layers of the adapters exist, and that their rank is below that of the matrices."""
    lora, model = config.lora, config.model
    if config.train.only != "lora":
        return None
    if not lora.targets or set(lora.targets) - set(TARGETS) or len(set(lora.targets)) < len(lora.targets):
        return ("lora.targets",), f"one or more of {', '.join(TARGETS)}, each once"
    if lora.rank > min(model.hidden, model.ffn, model.query_width):
        keys = ("lora.rank", "model.hidden", "model.ffn")
        return keys, "a lora.rank up to the width of the adapted matrices"
    try:
        adapted_layers(lora, model.layers)
    except ConfigError:
        return ("lora.layers", "model.layers"), f"null, or a range LOW..HIGH within 0..{model.layers - 1}"
    return None


def adapters_need_torch_layers(config: ResolvedConfig) -> Broken:
    """Check that the adapted linear layers are megatron-core's own."""
    if config.train.only == "lora" and config.model.attention == "te":
        return ("model.attention", "train.only"), "model.attention=sdpa with train.only=lora"
    return None


LORA_RULES: tuple[Rule, ...] = (adapters_are_trained, adapters_fit_the_model, adapters_need_torch_layers)
