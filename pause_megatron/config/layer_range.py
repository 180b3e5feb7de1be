"""Ranges of layers, LOW..HIGH, as `lora.layers` and `model.loop_layers` give them."""

from __future__ import annotations

from pause_megatron.errors import ConfigError


def layer_range(key: str, text: str | None, layers: int) -> range:
    """Return the numbers of the layers of a range, from 0 on.

    Args:
        key: The key that gives the range, for the message.
        text: LOW..HIGH, both ends included, or one number; None: all layers.
        layers: Layers of the model.

    Raises:
        ConfigError: No range of them.
    """
    if text is None:
        return range(layers)
    low, dots, high = (part.strip() for part in text.partition(".."))
    high = high if dots else low
    if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high) < layers):
        raise ConfigError(f"{key}: expected a range LOW..HIGH within 0..{layers - 1}, got {text!r}")
    return range(int(low), int(high) + 1)
