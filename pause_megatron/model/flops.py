"""Parameters and floating-point operations, for MFU."""

from __future__ import annotations

from dataclasses import dataclass

from pause_megatron.config.schema import ModelSection


@dataclass(frozen=True)
class ModelShape:
    """The sizes that arithmetic needs.

    Attributes:
        layers, hidden, heads, kv_heads, ffn, tied: as in the `model` section.
        vocabulary: live ids, text and pauses, without padding.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    tied: bool
    vocabulary: int

    @classmethod
    def of(cls, model: ModelSection, vocabulary: int) -> ModelShape:
        """Shape of a resolved `model` section."""
        return cls(model.layers, model.hidden, model.heads, model.kv_heads, model.ffn, bool(model.tied), vocabulary)


def parameter_count(shape: ModelShape) -> int:
    """Parameters of the whole model: embedding, layers, norms, and the output layer if it is not tied; no padding."""
    matrices = 1 if shape.tied else 2
    return matrices * shape.vocabulary * shape.hidden + _layers(shape) + shape.hidden


def flops_per_token(shape: ModelShape, sequence_length: int) -> float:
    """Floating-point operations of forward and backward per raw token: 6 N + 12 L d T.

    N counts the parameters that take part in a matrix product for every token: the layers and the output layer (also
    when it is tied), not the input embedding, whose lookup multiplies nothing. 12 L d T is attention over the whole
    window, not halved for causality, as in PaLM (Chowdhery et al. 2022, appendix B). Recomputation does not count, and
    the pause-aware head's saving is not subtracted: a run that computes less shows it as a higher figure.

    Args:
        shape: of the model.
        sequence_length: T, tokens of a window.
    """
    active = _layers(shape) + shape.hidden + shape.vocabulary * shape.hidden
    return 6.0 * active + 12.0 * shape.layers * shape.hidden * sequence_length


def _layers(shape: ModelShape) -> int:
    channels = shape.hidden // shape.heads
    attention = shape.hidden * channels * (2 * shape.heads + 2 * shape.kv_heads)
    return shape.layers * (attention + 3 * shape.hidden * shape.ffn + 2 * shape.hidden)
