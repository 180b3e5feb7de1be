"""`pause-megatron benchmark` on real ranks: its JSON is consistent, and agrees with a real run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path

import pytest
from support.ranks import run_on_ranks

from pause_megatron.cli import main
from pause_megatron.config.load import load
from pause_megatron.config.presets import step_flops
from pause_megatron.config.schema import ResolvedConfig

KEYS = ["data.sequence_length=64", "batch.global_size=8", "batch.micro_size=2", "model.layers=2"]
SIZES = ["--steps", "3", "--warmup", "1", "--top", "5", "--vocab-size", "500"]
# ranks, further keys
LAYOUTS = [
    (1, ["log.peak_tflops=0.5"]),
    (2, ["parallel.tensor=2", "parallel.sequence=true", "engine.precision=bf16", "data.intra_document_masking=true"]),
    (2, ["engine.zero_stage=3", "pause.window=trim", "pause.placement=bernoulli", "log.peak_tflops=0.25"]),
]


def benchmark(file: str, keys: list[str], recipe: str = "tiny-pause") -> tuple[int, str]:
    """The verb's exit code, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["benchmark", "--recipe", recipe, *SIZES, "--json", file, *keys])
    return code, printed.getvalue()


@pytest.mark.parametrize(("ranks", "keys"), LAYOUTS, ids=["alone", "tensor", "zero3"])
def test_the_json_is_true_to_itself(ranks, keys, tmp_path):
    file = tmp_path / "found.json"
    answers = run_on_ranks(ranks, benchmark, str(file), [*KEYS, *keys])
    assert [code for code, _ in answers] == [0] * ranks
    table, *others = [printed for _, printed in answers]
    assert others == [""] * (ranks - 1)
    assert max(map(len, table.splitlines())) <= 100 and re.match(rf"machine       {ranks} ranks? on a CPU\n", table)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    found = json.loads(file.read_text())
    assert (found["format"], found["version"]) == ("pause-megatron benchmark", 1)

    config = ResolvedConfig.model_validate(found["config"])
    assert config == load(recipe="tiny-pause", overrides=[*KEYS, *keys])

    seconds = found["step_seconds"]
    assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
    assert (found["steps"], found["warmup_steps"]) == (3, 1)
    assert found["raw_tokens_per_second"] * seconds["median"] == pytest.approx(8 * 64)
    text = found["text_tokens_per_second"] * seconds["median"]
    assert text == pytest.approx(found["text_tokens_per_step"]) and 8 * 32 < text < 8 * 64

    machine = found["machine"]
    assert (machine["device"], machine["cuda_name"], machine["gpu"], machine["ranks"]) == ("cpu", None, None, ranks)
    assert {"python", "torch", "megatron_core", "deepspeed", "triton"} < set(machine)
    assert found["kernels"] == "plain"

    # The formula, with the rows that really reached the head, summed over the three steps.
    targets = round(3 * found["targets_per_step"])
    flops = step_flops(config.model, 501, 64, tokens=3 * 8 * 64, targets=targets) / 3
    assert found["flops_per_step"] == round(flops)
    peak = config.log.peak_tflops
    if peak is None:
        assert found["mfu"] is None
    else:
        assert found["mfu"] == pytest.approx(flops / (seconds["median"] * ranks * peak * 1e12), rel=1e-9)

    memory = found["memory"]
    # Real ranks have threads that let go of tensors when they come round to it: 0.4 MB of 6 MB here.
    assert memory["peak_bytes"] == pytest.approx(memory["planned_bytes"], rel=0.1, abs=2 * 2**20)
    assert memory["reserved_bytes"] is None
    waits = found["host_waits"]
    assert all(math.isfinite(waits[name]) and waits[name] >= 0 for name in ("per_micro_batch", "per_step"))
    top = found["top_kernels"]
    assert len(top) == 5 and all(entry["calls_per_step"] >= 1 for entry in top)
    assert sum(entry["share"] for entry in top) <= 1
    assert all(entry["seconds_per_step"] > 0 for entry in top)


def test_a_real_corpus_is_read_where_one_is_given(corpus, tmp_path):
    file = tmp_path / "found.json"
    keys = [*KEYS, f"data.prefix={corpus}"]
    ((code, _),) = run_on_ranks(1, benchmark, str(file), keys)
    found = json.loads(file.read_text())
    assert code == 0 and found["windows"] == corpus
    assert found["flops_per_step"] == step_flops(
        load(overrides=["model.layers=2"]).model, 1001, 64, tokens=512, targets=round(found["targets_per_step"])
    )


def test_a_finetuning_reads_its_task(corpus, task_records, tmp_path):
    file = tmp_path / "found.json"
    keys = [
        *("model.preset=tiny", "model.layers=2", "data.sequence_length=128", "engine.precision=fp32"),
        *(f"task.path={task_records / 'commonsense_qa'}", f"data.tokenizer={Path(corpus).parent / 'tokenizer.model'}"),
    ]
    ((code, table),) = run_on_ranks(1, benchmark, str(file), keys, "finetune-commonsense_qa")
    found = json.loads(file.read_text())
    assert code == 0 and "task commonsense_qa" in table
    # Packed windows: padding is no token, and prompts are no targets.
    assert 0 < found["targets_per_step"] < found["text_tokens_per_step"] < found["raw_tokens_per_step"] <= 8 * 128
    assert found["raw_tokens_per_second"] * found["step_seconds"]["median"] == pytest.approx(
        found["raw_tokens_per_step"]
    )
