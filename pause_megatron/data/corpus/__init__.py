"""Tokenized corpora on disk: opening, blending and verifying the files at a prefix."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
