"""Measurements of `pause-megatron benchmark` in place of assumptions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pause_megatron.config.identity import ADDED_KEYS
from pause_megatron.config.model_from import SHAPE as SIZES
from pause_megatron.config.renamed import stored_value
from pause_megatron.config.schema import ResolvedConfig
from pause_megatron.errors import ConfigError
from pause_megatron.plan.machine import OPTIONAL, Assumptions, Cluster

FORMAT, VERSION = "pause-megatron benchmark", 1
# Keys that decide the work of a step: a benchmark with another value has another MFU.
SHAPE = (
    *(f"model.{name}" for name in SIZES if name not in ("family", "positions")),
    *("data.sequence_length", "data.intra_document_masking", "batch.micro_size", "engine.precision"),
    *("parallel.tensor", "parallel.sequence", "parallel.recompute"),
    *("model.attention", "model.head_chunk", "model.vocab_multiple"),
    *("pause.rate", "pause.window", "pause.softmax", "pause.embeddings", "pause.run", "pause.positions"),
    *("objective.name", "objective.z_loss", "objective.token_weights"),
    *("engine.deterministic", "train.only"),
)


def measured_values(
    path: str, config: ResolvedConfig, cluster: Cluster, assumptions: Assumptions, *, text_size: int
) -> Assumptions:
    """Return assumptions with the MFU of a benchmark, and with its ratio of measured to planned memory.

    Args:
        path: JSON of `pause-megatron benchmark`.
        config: Resolved configuration of the planned run.
        cluster: Nodes and GPUs of the planned run.
        assumptions: Assumptions to update.
        text_size: Ids of the text vocabulary.

    Raises:
        ConfigError: The file is not such a JSON, or it measured another GPU, model or micro-batch.
    """
    record = _read(path)
    machine, memory = _part(record, "machine", path), _part(record, "memory", path)
    if record.get("mfu") is None:
        where = machine.get("cuda_name") or machine.get("device")
        raise ConfigError(
            f"--measured {path}: expected an MFU, got none: {where} has no known peak; measure again with "
            "log.peak_tflops=TFLOPS"
        )
    mfu = _number(record, "mfu", path)
    if mfu > 1:
        raise ConfigError(f"--measured {path}: mfu: expected a fraction between 0 and 1, got {mfu}")
    different = list(_differences(record, path, config, cluster, text_size + config.pause.embeddings))
    if different:
        raise ConfigError(f"--measured {path}: it measured another run: {'; '.join(different)}")
    ratio = _number(memory, "peak_bytes", path) / _number(memory, "planned_bytes", path)
    if not 0.1 < ratio < 10:
        raise ConfigError(f"--measured {path}: expected 0.1 to 10 times the planned memory, got {ratio:g} times")
    source = f"measured: {path}, {machine.get('ranks')} ranks of {machine.get('cuda_name')}, with communication"
    return replace(
        assumptions,
        mfu=replace(OPTIONAL["mfu"], value=mfu, source=source, ranks=machine.get("ranks")),
        memory_ratio=replace(OPTIONAL["memory_ratio"], value=ratio, source=f"measured: {path}"),
    )


def _read(path: str) -> dict[str, Any]:
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ConfigError(f"--measured {path}: cannot be read: {reason}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        got = f'"format": {json.dumps(record.get("format"))}' if isinstance(record, dict) else "no object"
        raise ConfigError(f"--measured {path}: expected the JSON of `{FORMAT}`, got {got}")
    if record.get("version") != VERSION:
        raise ConfigError(f"--measured {path}: expected version {VERSION}, got {record.get('version')!r}")
    return record


def _part(record: dict[str, Any], name: str, path: str) -> dict[str, Any]:
    if not isinstance(record.get(name), dict):
        raise ConfigError(f"--measured {path}: {name}: expected an object, got {record.get(name)!r}")
    return record[name]


def _number(record: dict[str, Any], name: str, path: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**63:
        raise ConfigError(f"--measured {path}: {name}: expected a number > 0, got {repr(value)[:40]}")
    return value


def _differences(
    record: dict[str, Any], path: str, config: ResolvedConfig, cluster: Cluster, vocabulary: int
) -> Iterator[str]:
    """Yield the measured and the planned value where they differ."""
    gpu = record["machine"].get("gpu")
    if gpu != cluster.gpu.name:
        yield f"GPU {gpu}, planned {cluster.gpu.name}"
    if record.get("vocabulary") != vocabulary:
        yield f"a vocabulary of {record.get('vocabulary')} ids, pauses included, planned {vocabulary}"
    stored, planned = _part(record, "config", path), config.model_dump(mode="json")
    for key in SHAPE:
        section, name = key.split(".")
        if section in stored or key not in ADDED_KEYS:
            _part(stored, section, path)
        measured, now = stored_value(stored, key), planned[section][name]
        if measured is None:  # a key that the version which measured lacked
            measured = ADDED_KEYS.get(key)
        if measured != now:
            yield f"{key}={measured}, planned {now}"
    # Other placements make other windows with as many pauses (synthetic ids have none for some of them).
    placements = str(stored["pause"].get("placement")), planned["pause"]["placement"]
    if placements.count("every") == 1:
        yield f"pause.placement={placements[0]}, planned {placements[1]}"
    fused = planned["engine"]["kernels"] != "plain"
    if (record.get("kernels") != "plain") != fused:
        yield f"engine.kernels={record.get('kernels')}, planned {planned['engine']['kernels']}"
