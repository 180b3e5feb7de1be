"""The scripts in launchers/ work in their own checkout, for any CDPATH and working folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "gpu_check.sh"])
@pytest.mark.parametrize("called", ["launchers", "."])
def test_a_script_is_run_in_its_own_checkout(script, called, tmp_path):
    other, python = tmp_path / "other", tmp_path / "bin" / "python"
    for folder in (other / "launchers", python.parent):
        folder.mkdir(parents=True)
    (other / "launchers" / "setup.sh").write_text("echo the setup of another checkout; exit 9")
    python.write_text(f"#!/bin/sh\npwd -P > {tmp_path}/folder\nexit 3\n")
    python.chmod(0o755)
    environment = {**os.environ, "CDPATH": str(other), "NO_SETUP": "1", "PYTHON": str(python)}
    environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    words = ["bash", f"{called}/{script}", *([str(tmp_path / "run")] if script == "quickstart.sh" else [])]
    folder = ROOT if called == "launchers" else ROOT / "launchers"
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert (tmp_path / "folder").read_text() == f"{ROOT}\n"


def test_lint_runs_every_check_and_fails_if_one_fails(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\npwd -P >> {tmp_path}/folders\n[ "$2" != ruff ]\n')
    python.chmod(0o755)
    environment = {**os.environ, "NO_SETUP": "1", "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    words = ["bash", "lint.sh"]
    done = subprocess.run(words, cwd=ROOT / "launchers", env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    ran = [line for line in done.stderr.splitlines() if line.startswith("lint: ")]
    assert ran[:3] == ["lint: ruff check .", "lint: ruff format --check .", "lint: mypy"]
    assert ran[3:] == ["lint: failed: ruff check .", "lint: failed: ruff format --check ."]
    assert (tmp_path / "folders").read_text() == f"{ROOT}\n" * 3


def test_setup_finds_its_checkout_although_cd_prints(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    environment = {**os.environ, "CDPATH": ".", "PYTHON": str(python)}
    environment.pop("NO_SETUP", None)
    command = ["bash", "-c", "trap 'echo \"$root\"' EXIT; source launchers/setup.sh"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{ROOT}\n", done.stderr
