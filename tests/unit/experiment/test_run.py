"""Local execution of cells, with real, cheap verbs: order, isolated failures, one runner at a time, costs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.small_grid import cheap_cell, give_product, place_cells

from pause_megatron.cli import main
from pause_megatron.experiment import slurm
from pause_megatron.experiment.devices import gpus_of_slot, visible_gpus
from pause_megatron.experiment.execute import Stop, alone_or_deepspeed, arguments_of, under_srun
from pause_megatron.experiment.folder import LocatedCell, find_folder, state_of
from pause_megatron.experiment.ledger import Ledger, ledger_of, total
from pause_megatron.experiment.run_local import run_local
from pause_megatron.experiment.stored import CellFile, DoneFile, FailedFile, PlanFile
from pause_megatron.files.durable import only_writer


@pytest.fixture(autouse=True)
def _info(caplog):
    caplog.set_level(logging.INFO, "pause_megatron")


def tree(directory: Path) -> dict[str, LocatedCell]:
    """a <- b <- c, and e reads a and d, as its scores. The verb of d writes no output, so d fails."""
    a = cheap_cell("a")
    b = cheap_cell("b", a)
    d = cheap_cell("d")
    placed = place_cells(directory, [a, b, cheap_cell("c", b), d, cheap_cell("e", a, d)])
    for entry in placed.values():
        if entry.cell.name != "d":
            give_product(entry)
    return placed


def states(placed: dict[str, LocatedCell]) -> dict[str, str]:
    return {entry.cell.name: state_of(entry.folder) for entry in placed.values()}


def test_a_failed_cell_blocks_its_dependents_only_and_the_next_run_resumes(tmp_path, caplog):
    placed = tree(tmp_path)
    assert run_local(placed, jobs=2, stop=Stop()) == 1
    assert states(placed) == {"a": "done", "b": "done", "c": "done", "d": "failed", "e": "waiting"}
    said = caplog.messages
    assert said[0] == "5 cells: 0 done before, 5 to run, 2 at a time"
    assert said[-2:] == [said[-2], "failed: d"] and said[-2].startswith("3 of 5 cells done")
    starts = [line.split()[-1] for line in said if " start " in line]
    assert starts.index("a") < starts.index("b") < starts.index("c") and "e" not in starts

    before = {name: (entry.folder / "done.json").stat().st_mtime_ns for name, entry in placed.items() if entry.done}
    give_product(next(entry for entry in placed.values() if entry.cell.name == "d"))
    caplog.clear()
    assert run_local(placed, jobs=2, stop=Stop()) == 0
    assert caplog.messages[0] == "5 cells: 3 done before, 2 to run, 2 at a time"
    assert all((placed[name].folder / "done.json").stat().st_mtime_ns == when for name, when in before.items())
    done = DoneFile.read(next(entry for entry in placed.values() if entry.cell.name == "d").folder)
    assert done.attempts == 2 and done.ledger.raw_tokens == 30 and done.ledger.pauses == 3


def test_the_last_lines_of_a_failed_verb_are_shown(tmp_path, caplog):
    placed = place_cells(tmp_path, [cheap_cell("a")])
    (entry,) = placed.values()
    cell = CellFile.read(entry.folder)
    cell.model_copy(update={"arguments": ("--recipe", "tiny-sdt")}).write(entry.folder)
    assert run_local(placed, jobs=1, stop=Stop()) == 1
    failure = next(line for line in caplog.messages if "FAILED" in line)
    assert "exit code 2" in failure and "Did you mean 'tiny-std'?" in failure and str(entry.folder) in failure
    assert states(placed) == {"a": "failed"}
    assert FailedFile.read(entry.folder).code == 2


def test_a_run_waits_for_a_cell_of_a_killed_runner(tmp_path, caplog):
    placed = place_cells(tmp_path, [cheap_cell("a")])
    (entry,) = placed.values()
    give_product(entry)
    # A process that inherited the lock, like a verb that survived its runner.
    code = "import sys, time; print('up', flush=True); time.sleep(600)"
    with only_writer(entry.folder / ".lock", "a") as lock:
        orphan = subprocess.Popen([sys.executable, "-c", code], pass_fds=(lock,), stdout=subprocess.PIPE)
        orphan.stdout.readline()
        runner = threading.Thread(target=run_local, args=(placed,), kwargs={"jobs": 1, "stop": Stop()})
        runner.start()
        while not any("an earlier process" in line for line in caplog.messages):
            assert runner.is_alive()
            time.sleep(0.05)
        assert state_of(entry.folder) == "running"
    orphan.kill()
    orphan.wait()
    runner.join(60)
    assert states(placed) == {"a": "done"}


# A runner with a long verb, which starts like every verb.
RUNS_A_CELL = """
import sys
from pathlib import Path
from pause_megatron.experiment.execute import Stop, run_cell
begins = "from pause_megatron.host.launcher import *; end_with_launcher(); print('up', flush=True)"
verb = f"{begins}; import time; time.sleep(99)"
run_cell(Path(sys.argv[1]), lambda program, ranks: [sys.executable, "-c", verb], Stop())
"""


def test_a_verb_ends_with_its_runner(tmp_path):
    (entry,) = place_cells(tmp_path, [cheap_cell("a")]).values()
    runner = subprocess.Popen([sys.executable, "-c", RUNS_A_CELL, str(entry.folder)])
    log = entry.folder / "log.txt"
    while not (log.exists() and "\nup\n" in log.read_text()):
        assert runner.poll() is None
        time.sleep(0.05)
    assert state_of(entry.folder) == "running"
    runner.kill()
    runner.wait()
    deadline = time.monotonic() + 10
    while state_of(entry.folder) == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while "the launcher has exited: PAUSE_MEGATRON_LAUNCHER_PID" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_cell_starts_after_a_stop_request(tmp_path):
    placed, stop = tree(tmp_path), Stop()
    stop.request()
    assert run_local(placed, jobs=2, stop=stop) == 75
    assert set(states(placed).values()) == {"waiting"}


def test_a_cell_is_found_by_its_content_under_any_name(tmp_path):
    a = cheap_cell("a")
    (entry,) = place_cells(tmp_path, [a]).values()
    renamed = type(a)("other", a.verb, a.arguments, a.identity)
    assert renamed.fingerprint == a.fingerprint
    assert find_folder(tmp_path / "cells", renamed) == entry.folder
    assert find_folder(tmp_path / "cells", cheap_cell("b")).name.startswith("b-")


def test_a_job_waits_for_both_cells_that_it_reads(tmp_path, monkeypatch):
    submitted: list[list[str]] = []

    def sbatch(command: list[str]) -> str:
        submitted.append(command[1:-1])
        return f"{40 + len(submitted)}\n"

    for name, value in (("installed", lambda: True), ("queued_jobs", dict), ("output_of", sbatch)):
        monkeypatch.setattr(slurm, name, value)
    slurm.submit(tmp_path, tree(tmp_path), slurm.JobOptions())
    dependencies = [[], ["--dependency=afterok:41"], ["--dependency=afterok:42"], [], ["--dependency=afterok:41:44"]]
    assert submitted == [["--parsable", *each] for each in dependencies]


def test_placeholders_become_folders_and_launchers_get_their_ranks(tmp_path):
    a = cheap_cell("a")
    placed = place_cells(tmp_path, [a, type(a)("b", "export-hf", ("{input}", "{output}"), {}, a)])
    b = placed[list(placed)[1]].folder
    expected = [str(tmp_path / "cells" / a.folder_name / "run"), str(b / "hf")]
    assert arguments_of(b, CellFile.read(b)) == expected
    scored = type(a)("s", "score", (), {}, a)
    both = type(a)("f", "finetune", ("model.from={input}", "task.scores={scores}"), {}, a, scored)
    f = list(place_cells(tmp_path, [scored, both]).values())[1].folder
    values = tmp_path / "cells" / scored.folder_name / "scores.safetensors"
    assert arguments_of(f, CellFile.read(f)) == [f"model.from={expected[0]}", f"task.scores={values}"]
    assert alone_or_deepspeed(["m", "v"], 1) == [sys.executable, "-m", "m", "v"]
    command = alone_or_deepspeed(["m", "v"], 2)
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"] and command[-3:] == [
        "--module",
        "m",
        "v",
    ]
    assert under_srun(["m"], 4)[:3] == ["srun", "--ntasks", "4"]


def test_ledgers_add_up(tmp_path):
    lines = [{"step": step, "seconds": 2.0, "tokens": 10 * step, "text_tokens": 9 * step} for step in (2, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = ledger_of("pretrain", tmp_path, 3.0, wall_seconds=20, ranks=2)
    assert trained == Ledger(120.0, 40, 36, 4, 8.0, 20, 40, 1)
    entry = {"task": "t", "pauses": 5, "location": "append", "filler": None, "seconds": 1.5}
    entry["tokens"] = {"prompt": 50, "pauses": 10, "new": 40}
    entry |= {"value": 0.5, "n": 8, "prefix_attention": "causal", "seed": 0, "dtype": "fp32", "model": "m", "data": "d"}
    entries = [{**entry, "metric": "exact_match"}, {**entry, "metric": "f1"}, {**entry, "metric": "f1", "pauses": 0}]
    (tmp_path / "results.json").write_text(json.dumps({"version": 1, "results": entries}))
    scored = ledger_of("evaluate", tmp_path, 1.0, wall_seconds=4, ranks=1)
    assert scored == Ledger(200.0, 200, 180, 20, 3.0, 4, 4, 1)
    within = {**entry, "metric": "f1", "decoding": '{"every": 1}', "tokens": {**entry["tokens"], "inside": 7}}
    (tmp_path / "results.json").write_text(json.dumps({"version": 1, "results": [*entries, within]}))
    assert ledger_of("evaluate", tmp_path, 1.0, wall_seconds=4, ranks=1) == Ledger(307.0, 307, 270, 37, 4.5, 4, 4, 1)
    assert total([trained, scored]) == Ledger(320.0, 240, 216, 24, 11.0, 24, 44, 2)


def test_status_lists_complete_cells(tmp_path, capsys):
    placed = tree(tmp_path)
    PlanFile(cells=tuple(entry.folder.name for entry in placed.values()), points=()).write(tmp_path)
    run_local(placed, jobs=1, stop=Stop())
    assert main(["experiment", "status", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("5 cells: 3 done, 1 failed, 1 waiting\n")
    assert main(["experiment", "status", str(tmp_path / "nowhere")]) == 2
    assert "experiment run` wrote, got none" in capsys.readouterr().err


def test_concurrent_cells_have_different_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    gpus = visible_gpus()
    assert [gpus_of_slot(gpus, place, 2) for place in range(3)] == [("4", "5"), ("6", "7"), ("4", "5")]
    assert gpus_of_slot(gpus, 0, 8) == gpus_of_slot((), 0, 1) == gpus_of_slot(("GPU-1f", "GPU-2a"), 0, 2) == ()
    assert gpus_of_slot(("GPU-1f", "GPU-2a"), 1, 1) == ("GPU-2a",)
    command = " ".join(alone_or_deepspeed(["pause_megatron", "pretrain"], 2, ("6", "7")))
    assert "--include localhost:6,7 " in command and "--num_gpus" not in command

    placed = place_cells(tmp_path, [cheap_cell(name) for name in "abcd"])
    for entry in placed.values():
        give_product(entry)
    assert run_local(placed, jobs=4, stop=Stop()) == 0
    logs = [(entry.folder / "log.txt").read_text() for entry in placed.values()]
    assert sorted(log.split()[2] for log in logs) == [f"CUDA_VISIBLE_DEVICES={gpu}" for gpu in (4, 5, 6, 7)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
