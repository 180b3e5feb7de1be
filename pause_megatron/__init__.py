"""Pause-token pretraining (Goyal et al., ICLR 2024) for Megatron datasets and models under DeepSpeed."""

from __future__ import annotations

__version__ = "0.1.0"
