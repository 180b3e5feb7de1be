"""Documents to ids: one tokenizer for the whole project, with the reserved ids of `<pause>`."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
