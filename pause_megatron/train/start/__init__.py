"""How a run starts: from its own newest checkpoint, another checkpoint's weights, or random initialization."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
