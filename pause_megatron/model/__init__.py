"""megatron-core's GPT with pauses: built, initialised, and with a head that skips what is not predicted."""

from __future__ import annotations

from pause_megatron.model.build import build_model, transformer_config
from pause_megatron.model.decay import parameter_groups
from pause_megatron.model.gpt import PauseGPTModel
from pause_megatron.model.head import LMLoss
from pause_megatron.model.pause_rows import train_pause_rows_only
from pause_megatron.model.vocabulary import Vocabulary

__all__ = [
    "LMLoss",
    "PauseGPTModel",
    "Vocabulary",
    "build_model",
    "parameter_groups",
    "train_pause_rows_only",
    "transformer_config",
]
