"""`doctor`: independent probes, the exit code for machines that cannot train, and versions against the table."""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from pause_megatron.cli.support import installed
from pause_megatron.cli.support.finding import Finding
from pause_megatron.cli.support.probes import examine
from pause_megatron.versions import PACKAGES, TRIED, Package

TABLE = {package.name: package for package in PACKAGES}


def broken():
    yield Finding("never kept", "ok", "")
    raise ImportError("libcudart.so.12: cannot open shared object file\nsecond line")


def exits():
    print("noise of a library")
    raise SystemExit(3)


def fine():
    yield Finding("fine", "ok", "1.0")


def test_a_probe_that_fails_does_not_stop_the_others(capsys):
    findings = list(examine([("broken", broken), ("exits", exits), ("fine", fine)]))
    assert [finding.status for finding in findings[-3:]] == ["missing", "missing", "ok"]
    assert "ImportError: libcudart.so.12: cannot open shared object file" in findings[-3].text
    assert "second line" not in findings[-3].text
    assert capsys.readouterr() == ("", "")


def one(probe) -> Finding:
    (finding,) = probe()
    return finding


def test_an_absent_package_is_missing_or_optional():
    name, probe = installed.needed(Package("no-such-package", "1.0", "1.4", module="no_such_package"))
    finding = one(probe)
    assert (name, finding.status, finding.advice) == (
        "no-such-package",
        "missing",
        "pip install 'no-such-package>=1.0,<2'",
    )
    name, probe = installed.optional("no-such-package", "no_such_package", "speed")
    assert (one(probe).status, one(probe).advice) == ("optional", "")


def distribution(folder: Path, name: str, version: str, module: str = "", code: str = "") -> None:
    """What pip leaves of a distribution; with a module, if one is wanted."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if module:
        (folder / f"{module}.py").write_text(code)


def test_a_version_outside_of_the_range_fails_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    probe = installed.needed(Package("an-old-friend", "1.2.0", "1.4.1", fixed=2, module="an_old_friend"))[1]
    for version, status in (
        ("1.1.9", "missing"),
        ("1.2.0", "ok"),
        ("1.4.1", "ok"),
        ("1.4.9", "note"),
        ("1.5.0", "missing"),
    ):
        folder = tmp_path / version
        distribution(folder, "an-old-friend", version, "an_old_friend")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            sys.modules.pop("an_old_friend", None)
            finding = one(probe)
        assert finding.status == status, version
        if status == "missing":
            assert finding.text.startswith(f"{version}: expected >=1.2.0,<1.5")
            assert finding.advice == "pip install 'an-old-friend>=1.2.0,<1.5'"
        if status == "note":
            assert "the newest tested version is 1.4.1" in finding.text


def test_an_import_that_wants_another_package_names_that_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    distribution(tmp_path, "leaner", "1.0", "leaner", "import triton_of_no_machine\n")
    finding = one(installed.needed(Package("leaner", "1.0", "1.0"))[1])
    assert "No module named 'triton_of_no_machine'" in finding.text
    assert finding.advice.startswith("pip install triton_of_no_machine")


def doctor(path: Path | None = None) -> tuple[int, dict[str, dict]]:
    """The real program in a process of its own; `path` comes before everything that is installed."""
    parts = [str(path) if path else "", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in parts if part)}
    done = subprocess.run(
        [sys.executable, "-m", "pause_megatron", "doctor", "--json"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)}


def test_this_machine_can_train():
    code, findings = doctor()
    missing = [name for name, finding in findings.items() if finding["status"] == "missing"]
    assert (code, missing) == (0, [])
    for name in ("python", *TABLE, "own modules", "torch backends", "CPU", "memory", "disk", "recipes"):
        assert findings[name]["status"] in ("ok", "note")
    here = (platform.python_version(), metadata.version("torch"), metadata.version("megatron-core"))
    known = any(tried.like(*here) for tried in TRIED)
    assert findings["versions here"]["status"] == ("ok" if known else "note")
    assert all(version in findings["versions here"]["text"] for version in here)


# Run at the start of the process: as where nobody installed triton.
WITHOUT_TRITON = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] == "triton" else find(name, *rest))
"""


def test_what_breaks_although_it_imports_fails_and_absent_kernels_do_not(tmp_path):
    """DeepSpeed 0.19.7 imports, and only its version tells. A CPU build of torch brings no triton, which megatron-core
    imports from 0.18 on; before, only engine.kernels=triton needs it."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TRITON)
    distribution(tmp_path, "deepspeed", "0.19.7")
    code, findings = doctor(path=tmp_path)
    missing = [name for name, finding in findings.items() if finding["status"] == "missing"]
    assert (code, findings["deepspeed"]["advice"]) == (1, "pip install 'deepspeed>=0.19.8,<0.20'")
    assert findings["triton"]["status"] == "note" and "engine.kernels=triton is not" in findings["triton"]["text"]
    if TABLE["megatron-core"]._replace(lowest="0.18.0").admits(metadata.version("megatron-core")):
        assert missing == ["deepspeed", "megatron-core", "own modules"]
        assert "No module named 'triton'" in findings["megatron-core"]["text"]
        assert findings["megatron-core"]["advice"].startswith("pip install triton ")
        assert findings["own modules"]["advice"].endswith("not installed: pip install 'triton'")
    else:
        assert missing == ["deepspeed"]
        assert findings["own modules"]["text"].endswith("the Triton kernels")


def test_what_an_extra_brings_is_not_missed_for_training(monkeypatch):
    """The environment of the quickstart has no lm-eval."""
    real = importlib.import_module

    def without_lm_eval(name: str, *rest: str, **named: str):
        if name == "pause_megatron.evaluate.lm_eval_model":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *rest, **named)

    monkeypatch.setattr(installed.importlib, "import_module", without_lm_eval)
    (finding,) = installed.own_modules()
    missing = "but for modules of the extra pause-megatron[evaluate]"
    assert (finding.status, finding.text.partition(", ")[2]) == ("ok", missing)
