"""Metrics: exact match, F1, multiple choice, final number, last word."""

from __future__ import annotations

from pause_megatron.moved import forward

__getattr__ = forward(__name__)
