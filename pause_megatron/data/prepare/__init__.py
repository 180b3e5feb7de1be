"""The `prepare` step: tokenization of shards into a corpus, parallel and resumable."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
