"""Task examples to windows for supervised finetuning, with loss on the targets only."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
