"""The DeepSpeed dictionary: every number has one owner, and unknown keys are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pause_megatron.config import deepspeed as module
from pause_megatron.config.deepspeed import deepspeed_config, ds_config_names, zero_stage
from pause_megatron.config.load import load
from pause_megatron.errors import ConfigError

NAMES = ("zero0", "zero1", "zero2", "zero2-overlap", "zero3", "zero3-offload")


def config_with(tmp_path: Path, document: object, *overrides: str):
    path = tmp_path / "ds.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document, indent=2))
    return load(overrides=[f"engine.ds_config={path}", *overrides])


def error_of(config, data_parallel: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(config, data_parallel=data_parallel)
    return str(caught.value)


def test_the_shipped_files():
    assert ds_config_names() == tuple(sorted(NAMES))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_files_are_completed_from_the_run(name, precision):
    config = load(
        overrides=[
            f"engine.ds_config={name}",
            f"engine.precision={precision}",
            "optim.clip=0.5",
            "batch.global_size=64",
        ]
    )
    result = deepspeed_config(config, data_parallel=8)
    assert '"auto"' not in json.dumps(result)
    assert (result["train_batch_size"], result["train_micro_batch_size_per_gpu"]) == (64, 4)
    assert result["gradient_accumulation_steps"] == 2
    assert result["gradient_clipping"] == 0.5
    assert result["bf16"]["enabled"] is (precision == "bf16")
    assert result["fp16"]["enabled"] is False
    assert result["zero_optimization"]["stage"] == int(name[4]) == zero_stage(config)
    assert result["communication_data_type"] == "fp32"
    assert result["gradient_allreduce_op"] == "mean"


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_are_accepted_by_deepspeed(name):
    runtime = pytest.importorskip("deepspeed.runtime.config")
    config = load(overrides=[f"engine.ds_config={name}", "engine.precision=bf16"])
    parsed = runtime.DeepSpeedConfig(deepspeed_config(config, data_parallel=1))
    assert parsed.zero_optimization_stage == int(name[4])
    assert (parsed.train_batch_size, parsed.gradient_accumulation_steps) == (32, 8)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_hold_engine_keys_only(name):
    document = json.loads((module.shipped_folder() / f"{name}.json").read_text())
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert document[key] == "auto"
    assert document["gradient_clipping"] == document["bf16"]["enabled"] == "auto"


def test_every_setting_of_the_shipped_files_has_its_reason_in_the_readme():
    readme = (module.shipped_folder() / "README.md").read_text()

    def names(node):
        for key, value in node.items():
            yield key
            if isinstance(value, dict):
                yield from names(value)

    used = {key for name in NAMES for key in names(json.loads((module.shipped_folder() / f"{name}.json").read_text()))}
    assert {key for key in used if f"`{key}`" not in readme} == set()
    for name in NAMES:
        assert f"`{name}.json`" in readme


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_comes_from_the_run_where_the_file_says_auto(tmp_path, stage):
    assert zero_stage(load(overrides=[f"engine.zero_stage={stage}"])) == stage
    for document in ({}, {"zero_optimization": {"stage": "auto"}}):
        config = config_with(tmp_path, document, f"engine.zero_stage={stage}")
        assert deepspeed_config(config, data_parallel=1)["zero_optimization"]["stage"] == stage
    assert zero_stage(load()) == 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"zero_optimization": {"stage": 2}},
            '3: zero_optimization.stage: expected "auto" or 1 (from engine.zero_stage), got 2',
        ),
        (
            {"train_batch_size": 7},
            'ds.json:2: train_batch_size: expected "auto" or 32 (from batch.global_size), got 7',
        ),
        ({"gradient_clipping": 5}, 'expected "auto" or 1.0 (from optim.clip), got 5. Change one of the two'),
        ({"bf16": {"enabled": False}}, 'bf16.enabled: expected "auto" or true (from engine.precision), got false'),
        ({"fp16": {"enabled": True}}, 'fp16.enabled: expected "auto" or false (from engine.precision), got true'),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op: expected "auto" or "mean"'),
        (
            {"zero_optimisation": {}},
            "ds.json:2: unknown or unsupported key 'zero_optimisation'. Did you mean 'zero_optimization'?",
        ),
        (
            {"zero_optimization": {"stage": 1, "overlap_com": True}},
            "zero_optimization.overlap_com. Did you mean 'overlap_comm'?",
        ),
        ({"optimizer": {"type": "Adam"}}, "ds.json:2: remove 'optimizer': the optimizer is set by optim.*"),
        ({"steps_per_print": "auto", "log_level": "auto"}, 'ds.json:3: log_level: "auto" has no meaning for this key'),
        ({"zero_optimization": {"stage": 9}}, "zero_optimization.stage: expected 0, 1, 2, 3 or auto, got 9"),
        ({"zero_optimization": True}, "zero_optimization: expected an object {...}, got True"),
        ('{"bf16": {}, "bf16": {}}', "key 'bf16' is given twice"),
        ('{\n"bf16": }', "ds.json:2: not JSON"),
        ("[]", "expected an object {...}, got list"),
    ],
)
def test_contradictions_and_unknown_keys_are_refused(tmp_path, document, message):
    assert message in error_of(config_with(tmp_path, document, "engine.zero_stage=1"))


def test_values_that_agree_are_accepted(tmp_path):
    document = {"train_batch_size": 32, "gradient_clipping": 1, "bf16": {"enabled": True}, "wall_clock_breakdown": True}
    result = deepspeed_config(config_with(tmp_path, document), data_parallel=2)
    assert result["wall_clock_breakdown"] is True


def test_bf16_gradients_accumulate_in_fp32_where_deepspeed_can(tmp_path):
    for stage in (0, 1, 2, 3):
        config = load(overrides=[f"engine.zero_stage={stage}", "engine.precision=bf16"])
        dtype = deepspeed_config(config, data_parallel=1)["data_types"]["grad_accum_dtype"]
        assert dtype == ("bf16" if stage == 0 else "fp32")
    document = {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert "expected the precision of the model (bf16) with ZeRO stage 0" in error_of(config_with(tmp_path, document))


def test_a_name_that_does_not_ship():
    config = load(overrides=["engine.ds_config=zero4"])
    assert re.search("got 'zero4', which is neither. Did you mean 'zero[0-3]'", error_of(config))


def test_known_keys_are_those_of_the_installed_deepspeed():
    zero = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    fields = {field.alias or name for name, field in zero.model_fields.items()}
    deprecated = {
        field.alias or name
        for name, field in zero.model_fields.items()
        if (field.json_schema_extra or {}).get("deprecated")
    }
    assert fields >= module.ZERO_KEYS
    assert fields - module.ZERO_KEYS == deprecated
