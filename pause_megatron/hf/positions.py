"""Rotary positions and sliding windows of a config.json: read as transformers reads them, and written for all readers.

transformers 5 keeps the settings of rotary positions in `rope_parameters`; older files, and other programs, in
`rope_theta` and `rope_scaling`. A file may have both, then `rope_scaling` counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pause_megatron.config.families import Family
from pause_megatron.config.model_schema import ResolvedModel
from pause_megatron.hf.config_keys import ConfigKeys

SCALINGS = ("linear", "llama3", "yarn")
_THETA = 10000.0
_BETA_FAST, _BETA_SLOW = 32.0, 1.0


def read_rope(keys: ConfigKeys) -> dict[str, Any]:
    """Return the keys `rope_*` of `model:`.

    Args:
        keys: Keys of config.json.

    Raises:
        CheckpointError: A kind of scaling that the native model lacks, or a setting that is missing or out of range.
    """
    name = "rope_scaling" if keys.group("rope_scaling").names() else "rope_parameters"
    group = keys.group(name)
    if any(isinstance(group.get(key), Mapping) for key in group.names()):
        raise keys.wrong(name, "one group of keys for all layers", keys.get(name))
    for each in (keys, group):
        each.expect("partial_rotary_factor", (1, None))
    theta = group if "rope_theta" in group else keys
    base = theta.number("rope_theta", None if "rope_theta" in theta else _THETA)
    kind = group.get("rope_type", group.get("type", "default"))
    if kind == "default":
        return {"rope_base": base}
    if kind not in SCALINGS:
        raise group.wrong("rope_type" if "rope_type" in group else "type", f"default, {', '.join(SCALINGS)}", kind)
    found = {"rope_base": base, "rope_scaling": kind}
    if kind == "linear":
        return {**found, "rope_factor": group.number("factor", least=1.0)}
    # Where both places have it, transformers takes the one beside the group.
    place = keys if "original_max_position_embeddings" in keys else group
    positions = None if "original_max_position_embeddings" in place else keys.size("max_position_embeddings")
    found["rope_original_length"] = place.size("original_max_position_embeddings", positions)
    read = _read_llama3 if kind == "llama3" else _read_yarn
    return {**found, **read(keys, group, found)}


def _read_llama3(keys: ConfigKeys, group: ConfigKeys, found: Mapping[str, Any]) -> dict[str, Any]:
    low, high = group.number("low_freq_factor"), group.number("high_freq_factor")
    if low >= high:
        raise group.wrong("low_freq_factor", f"less than high_freq_factor = {high:g}", low)
    return {"rope_factor": group.number("factor", least=1.0), "rope_low_freq": low, "rope_high_freq": high}


def _read_yarn(keys: ConfigKeys, group: ConfigKeys, found: Mapping[str, Any]) -> dict[str, Any]:
    if found["rope_base"] <= 1:
        raise keys.wrong("rope_theta", "a number above 1 with yarn", found["rope_base"])
    if "factor" in group and group.get("factor") is None:
        factor = keys.size("max_position_embeddings") / found["rope_original_length"]
        if factor < 1:
            raise group.wrong("factor", "a number where max_position_embeddings is below the original one", None)
    else:
        factor = group.number("factor", least=1.0)
    fast = group.number("beta_fast") if group.get("beta_fast") else _BETA_FAST
    slow = group.number("beta_slow") if group.get("beta_slow") else _BETA_SLOW
    if slow >= fast:
        raise group.wrong("beta_slow", f"less than beta_fast = {fast:g}", slow)
    return {
        **{"rope_factor": factor, "rope_beta_fast": fast, "rope_beta_slow": slow},
        "rope_truncate": bool(group.get("truncate", True)),
        "rope_attention_factor": _attention_factor(group, factor),
    }


def _attention_factor(group: ConfigKeys, factor: float) -> float | None:
    """Return the factor of cosines and sines; None where it follows from `factor` as usual."""
    if group.get("attention_factor") is not None:
        return group.number("attention_factor")
    if not (group.get("mscale") and group.get("mscale_all_dim")):
        return None
    above, below = (
        1.0 if factor <= 1 else 0.1 * group.number(key) * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim")
    )
    return above / below


def rope_json(model: ResolvedModel) -> dict[str, Any]:
    """Return the keys of config.json about rotary positions, in the form of transformers 5 and in the older one.

    Args:
        model: Resolved sizes and options.
    """
    scaling: dict[str, Any] = {}
    if model.rope_scaling is not None:
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = model.rope_original_length
    if model.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": model.rope_low_freq, "high_freq_factor": model.rope_high_freq}
    if model.rope_scaling == "yarn":
        scaling |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
        if not model.rope_truncate:
            scaling["truncate"] = False
        if model.rope_attention_factor is not None:
            scaling["attention_factor"] = model.rope_attention_factor
    return {
        "rope_theta": model.rope_base,
        "rope_scaling": scaling or None,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_base},
    }


def read_window(keys: ConfigKeys, family: Family, layers: int) -> dict[str, Any]:
    """Return the keys `sliding_*` of `model:`; empty where every layer attends to all tokens before.

    Args:
        keys: Keys of config.json.
        family: Family of the model.
        layers: Number of layers.

    Raises:
        CheckpointError: Layers with and without a window in another order than all without, then all with it; or layer
            types that transformers does not follow for this family.
    """
    window = None
    if family.sliding == "all" or (family.sliding == "from" and keys.flag("use_sliding_window")):
        window = keys.size("sliding_window") if keys.get("sliding_window") is not None else None
    kinds = keys.get("layer_types")
    if kinds is None or (family.sliding != "from" and not kinds):
        first = _first_layer(keys) if family.sliding == "from" and window is not None else 0
    else:
        first = _first_of(kinds, keys, family, layers, window)
    return {} if window is None or first >= layers else {"sliding_window": window, "sliding_from": first}


def _first_layer(keys: ConfigKeys) -> int:
    value = keys.get("max_window_layers", 0)
    if type(value) is not int or not 0 <= value < 2**31:
        raise keys.wrong("max_window_layers", "a whole number, 0 or above", value)
    return value


def _first_of(kinds: Any, keys: ConfigKeys, family: Family, layers: int, window: int | None) -> int:
    """Return the first layer with a sliding window by a list of layer types."""
    if not isinstance(kinds, (list, tuple)):
        raise keys.wrong("layer_types", "a list of layer types, or null", kinds)
    full, sliding = "full_attention", "sliding_attention"
    if len(kinds) != layers:
        raise keys.wrong("layer_types", f"one type for each of num_hidden_layers = {layers}", kinds)
    if family.sliding != "from" or window is None:
        only = sliding if family.sliding == "all" and window is not None else full
        if any(kind != only for kind in kinds):
            reason = "without a sliding window" if window is None else "as transformers does not follow the list here"
            raise keys.wrong("layer_types", f"{only} in every layer, {reason}", kinds)
        return 0
    first = next((number for number, kind in enumerate(kinds) if kind != full), layers)
    if any(kind != sliding for kind in kinds[first:]):
        raise keys.wrong("layer_types", f"{full} up to some layer and {sliding} from it on", kinds)
    return first


def window_json(model: ResolvedModel, family: Family) -> dict[str, Any]:
    """Return the keys of config.json about sliding windows.

    Args:
        model: Resolved sizes and options, without loops.
        family: Family of the export.
    """
    if family.sliding == "never":
        return {}
    keys: dict[str, Any] = {"sliding_window": model.sliding_window}
    if family.sliding == "from":
        slides = model.sliding_window is not None
        keys |= {"use_sliding_window": slides, "max_window_layers": model.sliding_from if slides else model.layers}
    return keys
