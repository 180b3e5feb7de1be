"""Inverse frequencies of the rotary embedding where its angles are rescaled, as transformers computes them.

megatron-core has the rescaling of Llama 3 with fixed settings, and YaRN as another class. Here all kinds are numbers
that take the place of `inv_freq` in its RotaryEmbedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pause_megatron.config.model_schema import ResolvedModel


def inverse_frequencies(model: ResolvedModel) -> Tensor:
    """Return the angle of each pair of channels per position, fp32 [channels / 2].

    Args:
        model: Resolved sizes and options.
    """
    exponents = torch.arange(0, model.channels, 2, dtype=torch.float32) / model.channels
    periods = model.rope_base**exponents
    if model.rope_scaling == "yarn":
        return _yarn(model, periods)
    frequencies = 1.0 / periods
    if model.rope_scaling == "linear":
        return frequencies / model.rope_factor
    return _llama3(model, frequencies) if model.rope_scaling == "llama3" else frequencies


def attention_factor(model: ResolvedModel) -> float:
    """Return the factor of cosines and sines, which is not 1 for YaRN only.

    Args:
        model: Resolved sizes and options.
    """
    if model.rope_scaling != "yarn":
        return 1.0
    if model.rope_attention_factor is not None:
        return model.rope_attention_factor
    return 0.1 * math.log(model.rope_factor) + 1.0  # the factor is at least 1


def softmax_scale(model: ResolvedModel) -> float | None:
    """Return the factor of the scores, or None for 1 / sqrt(channels).

    A factor of the cosines and sines of queries and keys is its square as a factor of the scores.

    Args:
        model: Resolved sizes and options.
    """
    factor = attention_factor(model)
    return None if factor == 1.0 else factor**2 / math.sqrt(model.channels)


def _original_length(model: ResolvedModel) -> int:
    if model.rope_original_length is None:
        raise ValueError(f"model.rope_original_length: expected a length with {model.rope_scaling}, got None")
    return model.rope_original_length


def _llama3(model: ResolvedModel, frequencies: Tensor) -> Tensor:
    """Divide the low frequencies, keep the high ones, and interpolate between (Llama 3.1)."""
    length, low, high = _original_length(model), model.rope_low_freq, model.rope_high_freq
    wavelengths = 2 * math.pi / frequencies
    divided = frequencies / model.rope_factor
    share = (length / wavelengths - low) / (high - low)  # of the frequency that stays
    between = (1 - share) * frequencies / model.rope_factor + share * frequencies
    scaled = torch.where(wavelengths < length / high, frequencies, between)
    return torch.where(wavelengths > length / low, divided, scaled)


def _yarn(model: ResolvedModel, periods: Tensor) -> Tensor:
    """Interpolate by the number of turns in the original window (Peng et al. 2023, section 3.2)."""
    length, channels = _original_length(model), model.channels

    def channel(turns: float) -> float:
        """Return the channel, as a real number, that makes so many turns in the original window."""
        return channels * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(model.rope_base))

    first, last = channel(model.rope_beta_fast), channel(model.rope_beta_slow)
    if model.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    if first == last:
        last += 0.001  # no division by zero
    ramp = ((torch.arange(channels // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (model.rope_factor * periods) * (1 - kept) + 1.0 / periods * kept
