"""`plan --measured FILE`: a benchmark of the same run corrects it, one of another run is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pause_megatron.benchmark import Measurement, as_record
from pause_megatron.benchmark.machine import Machine
from pause_megatron.benchmark.record import Memory, StartUp, Waits
from pause_megatron.cli import main
from pause_megatron.config.batching import batch_plan
from pause_megatron.config.load import load

RUN = ("plan", "--recipe", "c4-1b-pause", "--gpus-per-node", "8")


@pytest.fixture
def found() -> Measurement:
    """A measurement of the recipe on eight H100, with made-up numbers: MFU 0.5, a tenth more memory than planned."""
    config = load(recipe="c4-1b-pause")
    return Measurement(
        config=config,
        batch=batch_plan(config, 8),
        stage=1,
        parameters=1,
        vocabulary=32_001,
        windows="made up",
        machine=Machine("cuda", "NVIDIA H100 80GB HBM3", "h100", 8, "3.12.1", {}),
        kernels="triton",
        warmup_steps=1,
        step_seconds=(2.0,),
        raw_tokens=1.0,
        text_tokens=1.0,
        targets=1.0,
        flops=8 * 10**15,
        peak_flops=10**15,
        memory=Memory(11 * 2**30, None, 10 * 2**30),
        waits=Waits(per_micro_batch=0, per_step=1),
        kernels_by_time=(),
        start_up=StartUp(1.0, 1.0, 1.0, 1.0),
    )


@pytest.fixture
def planned(tmp_path, capsys):
    """Plan with a record as FILE: exit code, what was printed, what went wrong."""

    def plan(record: object, *arguments: str) -> tuple[int, str, str]:
        path = tmp_path / "bench.json"
        path.write_text(record if isinstance(record, str) else json.dumps(record))
        code = main([*RUN, "--measured", str(path), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return plan


def test_what_was_measured_counts(planned, found, tmp_path):
    code, printed, _ = planned(as_record(found), "--json")
    (record,) = json.loads(printed)
    assert code == 0
    assert record["step"]["computing_mfu"] == pytest.approx(0.5)
    assert record["step"]["compute_parts_seconds"] is None
    phases = record["memory"]["phases_bytes"][record["memory"]["peak_phase"]]
    assert record["memory"]["tensors_bytes"] == pytest.approx(1.1 * sum(phases.values()))
    assert record["assumptions"]["mfu"]["source"].startswith(f"measured: {tmp_path / 'bench.json'}, 8 ranks of NVIDIA")


def test_the_table_reports_it(planned, found):
    code, printed, _ = planned(as_record(found))
    text = " ".join(printed.split())
    assert code == 0
    assert "MFU while computing 50.0%" in text
    assert "of the tensors counted x 1.100" in text
    assert "memory_ratio 1.1 of the tensors that are counted (measured: " in text


def test_an_mfu_that_is_given_still_wins(planned, found):
    _, printed, _ = planned(as_record(found), "--mfu", "0.4")
    assert "MFU while computing 40.0%" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--gpu", "h200"], "GPU h100, planned h200"),
        (["--gpu", "h100,h200"], "GPU h100, planned h200"),
        (["model.layers=17"], "model.layers=18, planned 17"),
        (["batch.micro_size=8", "parallel.recompute=full"], "batch.micro_size=4, planned 8; parallel.recompute=none"),
        (["data.sequence_length=1024"], "data.sequence_length=2048, planned 1024"),
        (["engine.kernels=plain"], "engine.kernels=triton, planned plain"),
        (["pause.run=4"], "pause.run=1, planned 4"),
        (["pause.placement=every"], "pause.placement=uniform, planned every"),
        (["objective.z_loss=0.1"], "objective.z_loss=0.0, planned 0.1"),
    ],
)
def test_another_run_is_refused(planned, found, arguments, difference):
    code, printed, error = planned(as_record(found), *arguments)
    assert (code, printed) == (2, "")
    assert "it measured another run: " in error and difference in error


def test_a_run_on_other_ranks_is_the_same(planned, found):
    code, _, _ = planned(as_record(found), "--nodes", "16")
    assert code == 0


def test_another_placement_of_as_many_pauses_is_the_same_work(planned, found):
    """Also in a record from before the keys of runs and objectives."""
    record = as_record(found)
    del record["config"]["objective"], record["config"]["pause"]["run"]
    assert planned(record, "pause.placement=isolated")[0] == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda record: "{", "cannot be read: not JSON"),
        (lambda record: [1], "expected the JSON of `pause-megatron benchmark`, got no object"),
        (lambda record: {"a": 1}, 'expected the JSON of `pause-megatron benchmark`, got "format": null'),
        (lambda record: record | {"version": 2}, "expected version 1, got 2"),
        (lambda record: record | {"mfu": "fast"}, "mfu: expected a number > 0, got 'fast'"),
        (lambda record: record | {"memory": None}, "memory: expected an object, got None"),
        (lambda record: record | {"memory": {"peak_bytes": 1}}, "planned_bytes: expected a number > 0, got None"),
        (lambda record: record | {"config": {}}, "model: expected an object, got None"),
    ],
)
def test_a_wrong_file_is_one_clear_error(planned, found, broken, message):
    code, printed, error = planned(broken(as_record(found)))
    assert (code, printed) == (2, "")
    assert error.count("\n") == 1 and message in error


def test_a_cpu_has_no_mfu(planned, found):
    on_cpu = replace(found, peak_flops=None, machine=Machine("cpu", None, None, 1, "3.12.1", {}))
    code, _, error = planned(as_record(on_cpu))
    assert code == 2 and "expected an MFU, got none: cpu has no known peak" in error


def test_a_missing_file(capsys):
    assert main([*RUN, "--measured", "nowhere.json"]) == 2
    assert "--measured nowhere.json: cannot be read: No such file" in capsys.readouterr().err


def test_measured_on_as_many_ranks_it_is_the_step_s_own_mfu(found, tmp_path, capsys):
    """Recomputation and traffic are in what was measured, so neither is added to it."""
    keys = ["parallel.recompute=full", "engine.ds_config=zero2"]
    record = as_record(found) | {"mfu": 0.4}
    record["config"]["parallel"]["recompute"] = "full"
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(record))
    assert main([*RUN, *keys, "--measured", str(path), "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["step"]["mfu"] == pytest.approx(0.4)
    assert main(["plan", "--recipe", "c4-1b-pause", "--nodes", "2", *keys, "--measured", str(path), "--json"]) == 0
    (wider,) = json.loads(capsys.readouterr().out)
    assert wider["step"]["mfu"] < 0.4
