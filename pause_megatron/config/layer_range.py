"""Ranges of layers, LOW..HIGH, as `lora.layers` and `model.loop_layers` give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pause_megatron.errors import ConfigError


@dataclass(frozen=True)
class LayerOrder(Sequence[int]):
    """Numbers of the layers in the order of a forward pass, of which a range repeats.

    It takes no memory: a configuration may state any number of layers before anything is checked.

    Attributes:
        layers: Number of layers.
        looped: The layers that repeat.
        loops: How many times they run.
    """

    layers: int
    looped: range
    loops: int

    def __len__(self) -> int:
        return self.layers + (self.loops - 1) * len(self.looped)

    def __getitem__(self, place: int) -> int:  # type: ignore[override]  # no slices
        """Return the number of the layer that runs at a place.

        Raises:
            IndexError: There is no such place.
        """
        if not 0 <= place < len(self):
            raise IndexError(place)
        first, size = self.looped.start, len(self.looped)
        if first <= place < first + size * self.loops:
            return first + (place - first) % size
        return place if place < first else place - (self.loops - 1) * size


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
