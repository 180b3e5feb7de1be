"""A whole experiment with the real verbs: run, killed in the middle and started again, run by SLURM, reported."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from support.processes import children
from support.slurm_cluster import installed
from support.slurm_job import Job
from support.small_grid import GRID, write_grid, write_records

from pause_megatron.cli import main
from pause_megatron.config.identity import deciding_keys
from pause_megatron.config.load import load
from pause_megatron.config.renamed import with_old_names

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


def arguments(grid: Path, corpus: str, records: Path, output: Path) -> list[str]:
    words = ["experiment", "run", "--config", str(grid), f"data.prefix={corpus}", "--task-path", str(records)]
    return [*words, "--output", str(output), "--jobs", "2"]


def start(words: list[str], log: Path) -> subprocess.Popen:
    with open(log, "ab") as file:
        return subprocess.Popen([sys.executable, "-m", "pause_megatron", *words], stdout=file, stderr=file)


def finish(words: list[str], log: Path) -> None:
    assert start(words, log).wait(300) == 0, log.read_text()


@pytest.fixture(scope="module")
def straight(corpus, records, tmp_path_factory) -> Path:
    """The experiment without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    finish(arguments(write_grid(folder / "grid.yaml"), corpus, records, folder / "out"), folder / "log")
    return folder / "out"


def kill_with_children(process: subprocess.Popen) -> None:
    """kill -9 of the runner and of every verb that it has started."""
    for victim in (process.pid, *children(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    process.wait()


def outcome(directory: Path) -> dict[str, object]:
    """Everything that an experiment found: losses of runs, scores and answers of evaluations; by cell."""
    found: dict[str, object] = {}
    for cell in sorted((directory / "cells").iterdir()):
        for path in sorted(cell.glob("run/metrics.jsonl")):
            found[cell.name] = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for path in sorted(cell.glob("results/samples/*.jsonl")):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[f"{cell.name}/{path.name}"] = {line["id"]: (line["prediction"], line["scores"]) for line in lines}
    return found


def test_a_killed_experiment_resumes_and_equals_the_uninterrupted_one(straight, corpus, records, tmp_path):
    # The same cells without the standard finetuning: what is shared has the same fingerprints.
    text = "\n".join(line for line in GRID.splitlines() if "StdPT_StdFT" not in line)
    grid = write_grid(tmp_path / "grid.yaml", text + "\nbaseline: StdPT_PauseFT\n")
    words = arguments(grid, corpus, records, tmp_path / "out")
    # A finished cell counts wherever it was computed: the pretraining is taken over.
    (pretrained,) = (straight / "cells").glob("pretrain-*")
    copy = Path(shutil.copytree(pretrained, tmp_path / "out" / "cells" / pretrained.name)) / "done.json"
    before = copy.stat().st_mtime_ns
    process = start(words, tmp_path / "log")
    while not (tmp_path / "out" / "plan.json").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    second = subprocess.run([sys.executable, "-m", "pause_megatron", *words], capture_output=True, text=True)
    assert second.returncode == 2 and "another process is working on the experiment" in second.stderr
    deadline = time.monotonic() + 120
    # In the middle of the finetuning, behind its first checkpoint.
    while not list((tmp_path / "out").glob("cells/finetune-*/run/checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    kill_with_children(process)
    assert not list((tmp_path / "out").glob("cells/finetune-*/done.json"))

    finish(words, tmp_path / "log")
    assert "4 cells: 1 done before, 3 to run" in (tmp_path / "log").read_text()
    assert copy.stat().st_mtime_ns == before
    (interrupted,) = (tmp_path / "out").glob("cells/finetune-*/log.txt")
    assert "resuming after step" in interrupted.read_text()
    found, expected = outcome(tmp_path / "out"), outcome(straight)
    assert len(found) == 4 and found == {name: expected[name] for name in found}


@pytest.mark.skipif(not installed(), reason="needs the Debian packages slurm-wlm and munge, and root")
def test_as_one_slurm_job_it_is_stopped_and_comes_back(straight, corpus, records, cluster, tmp_path, monkeypatch):
    for name, value in {**cluster.environment, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "out"
    shutil.copytree(straight, output)
    cell = next(output.glob("cells/evaluate-*-curve*"))
    shutil.rmtree(cell)
    words = arguments(write_grid(tmp_path / "grid.yaml"), corpus, records, output)[2:]
    job = Job(cluster, tmp_path / "job", "--gpus-per-node=0", str(ROOT / "launchers" / "experiment.sbatch"), *words)
    job.wait((cell / "log.txt").exists, "a cell that runs")
    cluster.run("scancel", "--batch", "--signal=USR2", job.number)  # what SLURM sends before the time limit
    job.finish()
    assert job.logs().count("7 cells: 6 done before, 1 to run") == 2, job.logs()
    assert outcome(output) == outcome(straight)


def test_a_fingerprint_is_of_the_very_configuration_that_ran(straight):
    for folder in (straight / "cells").glob("*"):
        cell = json.loads((folder / "cell.json").read_text())
        if cell["verb"] in ("pretrain", "finetune"):
            ran = json.loads(json.dumps(with_old_names(deciding_keys(load(folder / "run" / "config.yaml")))))
            named = cell["identity"]["config"]
            # The checkpoint that a finetuning begins with is named by its fingerprint, not by its path.
            assert {key for key in named if named[key] != ran[key]} <= {"model.from", "model.preset"}


def test_its_report_is_self_contained_and_counts_each_cell_once(straight, tmp_path, capsys):
    assert main(["experiment", "report", str(straight), "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {
        *("index.html", "figure3-web_questions.png", "variants-web_questions.png", "summary.json", "seeds.csv")
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cells"] == {"done": 7, "all": 7}
    (start,), (machine,) = summary["provenance"]["starts"], summary["provenance"]["cells"]
    assert start["command"][:2] == ["experiment", "run"] and machine["cells"] == 7
    assert machine["machine"] == start["origin"]["machine"] and machine["packages"]["torch"] == version("torch")
    assert {(score["variant"], score["m_inf"]) for score in summary["scores"]} == {
        *(("StdPT_StdFT", 0), ("StdPT_PauseFT", 0), ("StdPT_PauseFT", 3))
    }
    (entry,) = [score for score in summary["main"] if score["variant"] == "StdPT_PauseFT"]
    assert (entry["n"], entry["seeds"], entry["paper"]) == (8, 1, 12.4)
    assert entry["against_baseline"]["supported"] is False  # one seed supports nothing
    ledger, whole = summary["ledger"], summary["ledger"]["all cells, each once"]
    assert whole["cells"] == 7 and ledger["StdPT_StdFT"]["cells"] == ledger["StdPT_PauseFT"]["cells"] == 4
    (model,) = summary["models"]
    assert model["steps"] == 2 and whole["flops"] > model["raw_tokens"] * 6 * 1e4
    page = (tmp_path / "index.html").read_text()
    assert "http://" not in page and "https://" not in page and 'src="data:image/png' in page
    capsys.readouterr()
