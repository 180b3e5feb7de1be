"""What lies at PREFIX: `.bin`, `.idx`, tokenizer and manifest; opened, blended and verified."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
