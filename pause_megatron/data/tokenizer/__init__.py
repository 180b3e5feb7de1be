"""Tokenizers: loading, training, and the reserved ids of `<pause>`."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
