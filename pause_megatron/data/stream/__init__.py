"""Streaming: documents to windows while training, without a prepared corpus."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
