"""How a run begins: from its own checkpoint, from another model's weights, or from initial weights."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
