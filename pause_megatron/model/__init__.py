"""A GPT of megatron-core's parts with pause tokens: model, initialization, and an LM head that skips masked targets."""

from __future__ import annotations

from pause_megatron.model.auxiliary import Hints
from pause_megatron.model.build import build_model, transformer_config
from pause_megatron.model.decay import parameter_groups
from pause_megatron.model.gpt import PauseGPTModel
from pause_megatron.model.head import LMLoss
from pause_megatron.model.pause_rows import train_pause_rows_only
from pause_megatron.model.vocabulary import Vocabulary

__all__ = [
    "Hints",
    "LMLoss",
    "PauseGPTModel",
    "Vocabulary",
    "build_model",
    "parameter_groups",
    "train_pause_rows_only",
    "transformer_config",
]
