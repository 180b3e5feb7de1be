"""What a run trains on: a corpus, a stream of documents, or a task's examples."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
