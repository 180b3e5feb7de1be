"""What is built installs: a wheel from the source distribution finds its recipes, job template and DeepSpeed files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the unpacked wheel, built from the unpacked source distribution."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "copy"
    wanted = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
    wanted += ("CONTRIBUTING.md", "CITATION.cff")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("pause_megatron", "ds_configs", "launchers"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in wanted:
        shutil.copy(ROOT / name, copy / name)
    _setup(copy, "sdist", "--dist-dir", str(folder))
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder / "sdist")
    _setup(next((folder / "sdist").iterdir()), "bdist_wheel", "--dist-dir", str(folder))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def _setup(folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "setup.py", "-q", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain", "--dry-run", "--recipe", "tiny-pause", "engine.ds_config=zero3"], "ZeRO stage 3"),
        (["launch", "--recipe", "tiny-pause", "--gpus-per-node", "2"], "scontrol requeue"),
    ],
    ids=["pretrain", "launch"],
)
def test_the_installed_program_finds_its_data(installed, tmp_path, arguments, said):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import pause_megatron; from pause_megatron.cli import main;"
        "assert pause_megatron.__file__.startswith(sys.argv[1]), pause_megatron.__file__;"
        "sys.exit(main(sys.argv[2:]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (tmp_path / "slurm.conf").touch()  # no cluster; one that is missing is waited for
    environment["SLURM_CONF"] = str(tmp_path / "slurm.conf")
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert str(ROOT) not in done.stdout


def test_everything_that_ships_is_in_the_wheel(installed):
    package = installed / "pause_megatron"
    for folder, pattern, source in (
        ("recipes", "*.yaml", ROOT / "pause_megatron" / "recipes"),
        ("recipes/experiments", "*.yaml", ROOT / "pause_megatron" / "recipes" / "experiments"),
        ("tasks", "*.yaml", ROOT / "pause_megatron" / "tasks"),
        ("experiment", "*.yaml", ROOT / "pause_megatron" / "experiment"),
        ("slurm", "*.sbatch", ROOT / "pause_megatron" / "slurm"),
        ("experiment/report", "*.css", ROOT / "pause_megatron" / "experiment" / "report"),
        ("experiment/report", "*.js", ROOT / "pause_megatron" / "experiment" / "report"),
        ("ds_configs", "*.json", ROOT / "ds_configs"),
        (".", "**/*.py", ROOT / "pause_megatron"),
        (".", "py.typed", ROOT / "pause_megatron"),
    ):
        expected = {path.relative_to(source) for path in source.glob(pattern)}
        assert expected, pattern
        assert {path.relative_to(package / folder) for path in (package / folder).glob(pattern)} == expected


def test_the_source_distribution_has_the_documentation(installed):
    (source,) = (folder for folder in (installed.parent / "sdist").iterdir())
    for name in ("README.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "CHANGELOG.md"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    for folder in ("pause_megatron", "launchers", "ds_configs"):
        found = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("README.md")}
        assert found == {path.relative_to(source) for path in (source / folder).rglob("README.md")}
