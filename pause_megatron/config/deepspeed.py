"""DeepSpeed settings from a run's configuration and a ds_configs/*.json file, without contradictions or unknown keys.

Each setting has one owner. The JSON file sets how states are partitioned, offloaded and communicated. The run sets
batch sizes, clipping and precision. DeepSpeed ignores keys that it does not know, so they are refused here.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_megatron.config.batching import batch_plan
from pause_megatron.config.schema import EngineSection, ResolvedConfig
from pause_megatron.config.spelling import nearest
from pause_megatron.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]

# Keys that the run's configuration owns: in the JSON file "auto", absent, or the same value.
OWNERS = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size / (batch.micro_size x data-parallel ranks)",
    "gradient_clipping": "optim.clip",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
    "gradient_allreduce_op": "the loss, which is already multiplied by the data-parallel size",
}

# Keys that DeepSpeed 0.19 reads and that are supported here.
KNOWN = {
    *(owner.partition(".")[0] for owner in OWNERS),
    *("communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor", "disable_allgather"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio", "checkpoint", "comms_logger", "log_level"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers", "flops_profiler"),
    "disable_python_gc",
}

# Keys that DeepSpeed reads, and that would override the run's configuration.
ELSEWHERE = {
    "optimizer": "the optimizer is set by optim.*",
    "scheduler": "the learning rate is set by optim.*",
    "amp": "the precision is set by engine.precision",
    "torch_autocast": "the precision is set by engine.precision",
    "activation_checkpointing": "recomputation is set by parallel.recompute",
    "tensorboard": "TensorBoard is set by log.tensorboard",
    "tensor_parallel": "tensor parallelism is set by parallel.tensor",
    "sequence_parallel_size": "sequence parallelism is set by parallel.sequence",
    "data_efficiency": "windows and their order are made by data.* and pause.*",
    "curriculum_learning": "windows and their order are made by data.* and pause.*",
    "managed_gradient_accumulation": "accumulation is managed by the batch.* keys",
    "autotuning": "it starts jobs of its own; tune batch.micro_size by hand",
}

# Keys of "zero_optimization"; the test compares them with the installed DeepSpeed.
ZERO_KEYS = {
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights"),
    *("offload_param", "offload_optimizer", "zenflow", "sub_group_size", "ignore_unused_parameters"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save"),
    *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
    *("round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights"),
    *("zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear"),
    *("pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
    *("leaf_module", "save_muon_momentum_buffer_in_memory", "elastic_checkpoint", "legacy_stage1"),
}


@dataclass(frozen=True)
class _Document:
    """A parsed JSON file and its text, for line numbers in messages."""

    path: Path
    text: str
    data: dict[str, Any]

    def at(self, key: str) -> str:
        """Return FILE:LINE of a dotted key, or FILE where its last name occurs more than once."""
        lines = [
            n for n, line in enumerate(self.text.splitlines(), 1) if re.search(rf'"{key.split(".")[-1]}"\s*:', line)
        ]
        return f"{self.path}:{lines[0]}" if len(lines) == 1 else str(self.path)

    def get(self, key: str) -> Any:
        """Return the value of a dotted key; "auto" where it is absent."""
        value: Any = self.data
        for name in key.split("."):
            value = value.get(name, "auto") if isinstance(value, dict) else "auto"
        return value


def ds_config_names() -> tuple[str, ...]:
    """Return the names of the DeepSpeed files that ship."""
    return tuple(sorted(file.stem for file in shipped_folder().glob("*.json")))


def ds_config_path(engine: EngineSection) -> Path:
    """Return the DeepSpeed file of a run: a path, a name that ships, or by default the plain one of the ZeRO stage.

    Args:
        engine: Engine section.

    Raises:
        ConfigError: `engine.ds_config` is neither a file nor a name that ships.
    """
    name = engine.ds_config or f"zero{1 if engine.zero_stage is None else engine.zero_stage}"
    if name in ds_config_names():
        return shipped_folder() / f"{name}.json"
    if not Path(name).is_file():
        names = ds_config_names()
        raise ConfigError(
            f"engine.ds_config: expected a DeepSpeed JSON file or one of {', '.join(names)}; "
            f"got {name!r}, which is neither{nearest(name, names)}"
        )
    return Path(name)


def zero_stage(config: ResolvedConfig) -> int:
    """Return the ZeRO stage of a run: the file's; where that has "auto" or none, `engine.zero_stage`; else 1.

    Args:
        config: Resolved configuration.

    Raises:
        ConfigError: The file cannot be used, or contradicts `engine.zero_stage`.
    """
    return _stage(_read(ds_config_path(config.engine)), config.engine)


def deepspeed_config(config: ResolvedConfig, *, data_parallel: int) -> dict[str, Any]:
    """Return the complete dictionary for `deepspeed.initialize(config=...)`.

    Args:
        config: Resolved configuration.
        data_parallel: Data-parallel size.

    Raises:
        ConfigError: The file is missing, is not JSON, has an unknown key, or contradicts the run's configuration.
    """
    document = _read(ds_config_path(config.engine))
    stage = _stage(document, config.engine)
    plan = batch_plan(config, data_parallel * config.parallel.tensor)
    bf16 = config.engine.precision == "bf16"
    owned = {
        "train_batch_size": plan.global_size,
        "train_micro_batch_size_per_gpu": plan.micro_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": float(config.optim.clip),
        "bf16.enabled": bf16,
        "fp16.enabled": False,
        "zero_optimization.stage": stage,
        "gradient_allreduce_op": "mean",
    }
    for key, value in owned.items():
        _refuse_contradiction(document, key, value)
    result = json.loads(json.dumps(document.data))
    for key, value in (_fallbacks(config, stage) | owned).items():
        if key in owned or document.get(key) == "auto":
            _put(result, key, value)
    _refuse_leftover_auto(document, result)
    _refuse_mixed_accumulation(document, result, stage, bf16)
    return result


def _fallbacks(config: ResolvedConfig, stage: int) -> dict[str, Any]:
    """Return settings for keys that are "auto" or absent in the file; ds_configs/README.md gives the reasons."""
    bf16 = config.engine.precision == "bf16"
    hidden = config.model.hidden
    fallbacks = {
        "communication_data_type": "fp32",
        "data_types.grad_accum_dtype": "bf16" if bf16 and stage == 0 else "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers.throughput.enabled": False,
    }
    if stage > 0:
        fallbacks["zero_optimization.reduce_bucket_size"] = 50_000_000
    if stage == 1 and bf16:
        fallbacks["bf16.immediate_grad_update"] = True
    if stage == 3:
        fallbacks["zero_optimization.stage3_prefetch_bucket_size"] = 9 * hidden * hidden // 10
        fallbacks["zero_optimization.stage3_param_persistence_threshold"] = 10 * hidden
    return fallbacks


def shipped_folder() -> Path:
    """Return the folder of the shipped files: inside the installed package, or at the top of a clone."""
    installed = _PACKAGE / "ds_configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "ds_configs"


def _read(path: Path) -> _Document:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(f"{path}: key {key!r} is given twice")
            seen[key] = value
        return seen

    try:
        text = path.read_text(encoding="utf-8-sig")
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"engine.ds_config: {path} cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected an object {{...}}, got {type(data).__name__}")
    document = _Document(path, text, data)
    _refuse_unknown(document)
    return document


def _refuse_unknown(document: _Document) -> None:
    for key in document.data:
        if key in ELSEWHERE:
            raise ConfigError(f"{document.at(key)}: remove {key!r}: {ELSEWHERE[key]}")
        if key not in KNOWN:
            raise ConfigError(f"{document.at(key)}: unknown or unsupported key {key!r}{nearest(key, KNOWN)}")
    for group in ("zero_optimization", "bf16", "fp16", "data_types", "timers"):
        if not isinstance(document.data.get(group, {}), dict):
            got = document.data[group]
            raise ConfigError(f"{document.at(group)}: {group}: expected an object {{...}}, got {got!r}")
    for key in document.data.get("zero_optimization", {}):
        if key not in ZERO_KEYS:
            hint = nearest(key, ZERO_KEYS)
            raise ConfigError(f"{document.at(key)}: unknown or outdated key zero_optimization.{key}{hint}")


def _stage(document: _Document, engine: EngineSection) -> int:
    stage = document.get("zero_optimization.stage")
    if stage == "auto":
        return 1 if engine.zero_stage is None else engine.zero_stage
    if type(stage) is not int or stage not in range(4):
        raise ConfigError(
            f"{document.at('stage')}: zero_optimization.stage: expected 0, 1, 2, 3 or auto, got {stage!r}"
        )
    if engine.zero_stage is not None and engine.zero_stage != stage:
        _refuse_contradiction(document, "zero_optimization.stage", engine.zero_stage)
    return stage


def _refuse_contradiction(document: _Document, key: str, value: Any) -> None:
    given = document.get(key)
    if given != "auto" and (given != value or isinstance(given, bool) != isinstance(value, bool)):
        raise ConfigError(
            f'{document.at(key)}: {key}: expected "auto" or {json.dumps(value)} (from {OWNERS[key]}), '
            f"got {json.dumps(given)}. Change one of the two"
        )


def _put(target: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        target = target.setdefault(group, {})
    target[name] = value


def _refuse_leftover_auto(document: _Document, node: Any, path: str = "") -> None:
    if node == "auto":
        raise ConfigError(f'{document.at(path)}: {path}: "auto" has no meaning for this key; give a value or remove it')
    if isinstance(node, dict):
        for name, value in node.items():
            _refuse_leftover_auto(document, value, f"{path}.{name}" if path else name)


def _refuse_mixed_accumulation(document: _Document, result: dict[str, Any], stage: int, bf16: bool) -> None:
    dtype = result["data_types"]["grad_accum_dtype"]
    if stage == 0 and dtype != ("bf16" if bf16 else "fp32"):
        raise ConfigError(
            f"{document.at('grad_accum_dtype')}: data_types.grad_accum_dtype: expected the precision of the model "
            f"({'bf16' if bf16 else 'fp32'}) with ZeRO stage 0, because DeepSpeed has no other; got {dtype!r}. "
            "Use stage 1, 2 or 3 to accumulate bf16 gradients in fp32"
        )
