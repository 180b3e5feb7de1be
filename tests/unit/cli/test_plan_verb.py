"""`pause-megatron plan`: the table, JSON, exit codes, and input that cannot be planned."""

from __future__ import annotations

import json

import pytest

from pause_megatron.cli import main
from pause_megatron.config.quantities import scaled

RUN = ("plan", "--recipe", "c4-1b-pause", "--nodes", "16", "--gpus-per-node", "8")


def test_a_comparison_of_gpus_is_one_table(capsys):
    assert main([*RUN, "--gpu", "a100-40,h100,h200"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {line[:38].strip(): line[38:].split() for line in lines[: lines.index("")]}
    assert table["GPU"] == ["a100-40", "h100", "h200"]
    assert table["ZeRO stage"] == ["1", "1", "1"]
    assert table["fits"] == ["yes", "yes", "yes"]
    assert table["parameters of a rank"] == ["1,042,360,320"] * 3
    mfu = [float(cell.rstrip("%")) for cell in table["MFU while computing"]]
    assert mfu[1] < mfu[2] < mfu[0]  # more bandwidth for the same peak; a third of the peak
    assert len(table["matrix products"]) == len(table["memory-bound kernels"]) == 6  # a number and its unit each
    assert table["buffers"] == ["0.00", "GiB"] * 3
    assert table["budget, raw tokens"] == ["21,000,880,128"] * 3
    text = " ".join("\n".join(lines).split())
    assert "gradients all_reduce 128 data between nodes 3.88 GiB" in text
    assert "node_mtbf_hours 6300 hours" in text
    for assumed in ("a100-40 39.4 GiB, 312 TFLOP/s", "h100 79.1 GiB, 989.4 TFLOP/s", "write_bytes 1e9 bytes/s"):
        assert assumed in text


def test_a_finetuning_of_no_model_is_warned_about(capsys):
    assert main(["plan", "--recipe", "finetune-coqa"]) == 0
    printed = capsys.readouterr().out
    assert "warning: model.from is not given" in printed
    assert "by the examples" in printed


def test_json_has_every_assumption_with_unit_and_source(capsys):
    assert main([*RUN, "--json", "--mfu", "0.4", "--assume", "write_bytes=5e8"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert all(set(entry) == {"value", "unit", "source"} for entry in record["assumptions"].values())
    assert record["assumptions"]["mfu"]["value"] == 0.4
    assert record["assumptions"]["write_bytes"]["source"] == "given"
    assert record["checkpoint"]["seconds"] == pytest.approx(record["checkpoint"]["bytes"] / (16 * 5e8))
    memory = record["memory"]
    assert memory["tensors_bytes"] == sum(memory["phases_bytes"][memory["peak_phase"]].values())
    assert record["step"]["raw_tokens"] == 512 * 2048
    assert record["fits"] is True and record["remedies"] == []


def test_a_run_that_does_not_fit_ends_with_2_and_remedies(capsys):
    assert main([*RUN, "--gpu", "h200,a100-40", "batch.micro_size=1", "model.layers=150"]) == 2
    captured = capsys.readouterr()
    assert "a100-40: does not fit" in captured.out
    assert "parallel.tensor=4 parallel.sequence=true" in captured.out
    vocabulary = "pause-megatron: vocabulary: 32,000 text tokens (assumed) + 1 pause\n"
    assert captured.err == f"{vocabulary}pause-megatron: does not fit on a100-40\n"


def test_a_warning_is_printed(capsys):
    assert main(["plan", "--recipe", "c4-1b-pause", "--gpus-per-node", "2", "--nodes", "2", "parallel.tensor=4"]) == 0
    assert "warning: parallel.tensor=4 spans nodes of 2 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10"], "gb300; got 'h10'. Did you mean 'h100'?"),
        (["--assume", "mfu"], "--assume: expected NAME=NUMBER, got 'mfu'"),
        (["--assume", "mf=1"], "--assume: expected one of mfu,"),
        (["--mfu", "42"], "--mfu: expected a fraction between 0 and 1, got 42"),
        (["--nodes", "3"], "batch.global_size: expected a multiple of batch.micro_size (4)"),
        (["--nodes", "0"], "expected an integer >= 1, got '0'"),
        (["parallel.tensor=3"], "expected model.heads to be a multiple of parallel.tensor"),
    ],
)
def test_input_that_cannot_be_planned(arguments, message, capsys):
    assert main(["plan", "--recipe", "c4-1b-pause", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_s_own_flops_are_those_of_its_plan(capsys):
    """`--dry-run` and `plan` count the same rows."""
    assert main(["plan", "--recipe", "tiny-pause", "--gpus-per-node", "1", "--vocab-size", "8000", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert main(["pretrain", "--recipe", "tiny-pause", "--dry-run", "--vocab-size", "8000"]) == 0
    assert scaled(record["step"]["model_flops"]) in capsys.readouterr().out
