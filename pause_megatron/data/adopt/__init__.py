"""The `adopt` step: checks of a corpus of Megatron-LM's preprocess_data.py, and its manifest."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
