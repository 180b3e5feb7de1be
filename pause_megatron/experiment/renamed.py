"""Keys of grids of earlier versions, translated into present ones."""

from __future__ import annotations

import warnings
from typing import Any

from pause_megatron.errors import ConfigError


def with_new_keys(tree: dict[str, Any], locations: dict[tuple[str, ...], str]) -> None:
    """Translate `extra_layers: {...}` of a model into `extra: {spend: layers, ...}`, in place, with a FutureWarning.

    Args:
        tree: The grid.
        locations: FILE:LINE of each key by its path, translated too.

    Raises:
        ConfigError: A model has both keys.
    """
    models = tree.get("models")
    for name, model in models.items() if isinstance(models, dict) else ():
        if not isinstance(model, dict) or "extra_layers" not in model:
            continue
        old, new = ("models", name, "extra_layers"), ("models", name, "extra")
        where = f"{locations.get(old, 'command line')}: models.{name}"
        value = model.pop("extra_layers")
        if value is None:
            continue
        if model.get("extra") is not None:
            raise ConfigError(f"{where}: expected extra or its old form extra_layers, got both. Remove extra_layers")
        model["extra"] = {"spend": "layers", **value} if isinstance(value, dict) else value
        for path, place in list(locations.items()):
            if path[:3] == old:
                locations[(*new, *path[3:])] = place
        warnings.warn(
            f"{where}: extra_layers is now extra: {{spend: layers, ...}}; the old form works until 0.2",
            FutureWarning,
            stacklevel=3,
        )
