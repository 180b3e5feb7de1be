"""Download and disk sizes that setup.sh prints: pip's resolution over a folder of wheels as the index."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launchers" / "install_size.py"
MIB = 2**20


def wheel(folder: Path, name: str, version: str, size: int, *needs: str) -> None:
    """A wheel that pip resolves and that is `size` bytes of content large."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as file:
        file.writestr(f"{stem}.dist-info/METADATA", metadata)
        file.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name.replace('-', '_')}/content", os.urandom(size))
        file.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def indexes(tmp_path_factory) -> dict[str, Path]:
    """A CUDA build of 30 + 70 MiB, and a CPU build of 20 MiB."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("cuda", "cpu")}
    wheel(folders["cuda"], "torch", "2.13.0", 30 * MIB, "nvidia-cublas")
    wheel(folders["cuda"], "nvidia-cublas", "13.1", 70 * MIB)
    wheel(folders["cpu"], "torch", "2.13.0+cpu", 20 * MIB)
    return folders


def said(venv: Path, links: str, *arguments: str) -> tuple[int, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": links}
    done = subprocess.run(
        [str(venv / "bin" / "python"), str(SCRIPT), str(venv), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert not done.stdout and "Traceback" not in done.stderr
    return done.returncode, done.stderr


def constraint(tmp_path: Path) -> list[str]:
    """Pins with markers, which are pip's to read."""
    file = tmp_path / "constraints.txt"
    file.write_text('torch==2.13.0; python_version >= "3.10"\ntorch==1.0; python_version < "3.10"\n')
    return ["torch", "--constraint", str(file)]


def test_a_cuda_build_is_distinguished_from_a_cpu_build(venv, indexes, tmp_path):
    code, text = said(venv, str(indexes["cuda"]), *constraint(tmp_path))
    first, second, *advice = text.splitlines()
    assert code == 0
    assert first == ("setup: torch 2.13.0 (a CUDA build, with NVIDIA's libraries): 0.1 GB to download, 0.2 GB on disk")
    assert second.startswith("setup: with all else about 0.3 GB to download and 1.1 GB on disk at ")
    assert "TORCH='torch==2.13.0+cpu' PIP_EXTRA_INDEX_URL=" in advice[-1]
    code, text = said(venv, str(indexes["cpu"]), *constraint(tmp_path))
    assert code == 0 and "setup: torch 2.13.0+cpu (a CPU build): 0.0 GB to download, 0.1 GB on disk" in text
    assert "TORCH=" not in text
    both = f"{indexes['cuda']} {indexes['cpu']}"
    assert "(a CPU build)" in said(venv, both, "torch==2.13.0+cpu")[1]  # as the advice says


def test_an_unmet_requirement_is_left_to_pip_and_nothing_is_installed(venv, indexes):
    code, text = said(venv, str(indexes["cuda"]), "torch==9.9")
    assert code == 0 and text.startswith("setup: the size of the download is not known")
    assert not list(venv.glob("lib/*/site-packages/torch*"))


def test_a_disk_that_is_too_small_is_refused(venv, indexes, monkeypatch, capsys):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import install_size
    finally:
        sys.path.remove(str(SCRIPT.parent))
    torch = install_size.Torch("2.13.0", True, 2.7e9, True)
    monkeypatch.setattr(install_size, "resolve", lambda *_: [])
    monkeypatch.setattr(install_size, "torch_of", lambda _: torch)
    usage = install_size.shutil.disk_usage(venv)
    monkeypatch.setattr(install_size.shutil, "disk_usage", lambda _: usage._replace(free=3_000_000_000))
    monkeypatch.setattr(sys, "argv", ["install_size.py", str(venv / "deeper" / "still"), "torch"])
    assert install_size.main() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("setup: error: expected 6.3 GB free at ") and "got 3.0 GB; make room, set VENV" in error


OTHER = "3.10" if sys.version_info[:2] != (3, 10) else "3.11"


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("3.9", "expected Python 3.10 to 3.13, got 3.9 ("),
        ("", "expected Python 3.10 to 3.13, got none ("),
        ("3.14", "expected Python 3.10 to 3.13, got 3.14 ("),
        (OTHER, f"to be of Python {OTHER}, as PYTHON is, got {{0.major}}.{{0.minor}}; remove it, or set VENV"),
    ],
)
def test_an_interpreter_that_does_not_fit_is_refused_before_anything_is_done(venv, tmp_path, version, message):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    environment = {**os.environ, "VENV": str(venv), "PYTHON": str(python)}
    environment.pop("NO_SETUP", None)
    command = ["bash", "-c", f"source {ROOT / 'launchers' / 'setup.sh'}; echo reached"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and not done.stdout
    assert message.format(sys.version_info) in done.stderr
    assert not list(venv.glob(".installed-*"))
