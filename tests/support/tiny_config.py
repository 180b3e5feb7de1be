"""Configurations of models that a CPU trains in a second: the sizes that many tests share, and nothing else."""

from __future__ import annotations

from pause_megatron.config import ResolvedConfig, load


def tiny_model(*, layers: int = 2, hidden: int = 32, heads: int = 2, **sizes: object) -> tuple[str, ...]:
    """Return the `model.*` overrides of a small model, for a command line or `load`.

    Args:
        layers: Transformer layers.
        hidden: Width of the residual stream.
        heads: Attention heads.
        **sizes: Further keys of the model section, such as kv_heads or tied.
    """
    keys = {"preset": None, "layers": layers, "hidden": hidden, "heads": heads, **sizes}
    return tuple(f"model.{name}={_yaml(value)}" for name, value in keys.items())


def tiny_config(*overrides: str, layers: int = 2, hidden: int = 32, heads: int = 2, **sizes: object) -> ResolvedConfig:
    """Return the resolved configuration of a small model.

    Args:
        *overrides: `key.path=value`, behind the sizes.
        layers, hidden, heads, **sizes: As in `tiny_model`.
    """
    return load(overrides=[*tiny_model(layers=layers, hidden=hidden, heads=heads, **sizes), *overrides])


def _yaml(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
