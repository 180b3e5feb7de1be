"""How answers are judged: exact match, F1, multiple choice, final numbers."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
