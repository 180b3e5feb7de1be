"""`doctor`: probes stand alone, and the exit code says whether training can run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pause_megatron.cli import probes
from pause_megatron.cli.probes import Finding, examine


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


@pytest.mark.parametrize(("optional", "status"), [("", "missing"), ("speed", "optional")])
def test_an_absent_package_is_missing_or_optional(optional, status):
    name, probe = probes._package("no-such-package", "no_such_package", ">=1", optional=optional)
    (finding,) = probe()
    assert (name, finding.status) == ("no-such-package", status)
    assert finding.advice == ("" if optional else "pip install 'no-such-package>=1'")


def test_this_machine_can_train():
    done = subprocess.run([sys.executable, "-m", "pause_megatron", "doctor", "--json"], capture_output=True, text=True)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    missing = [name for name, finding in findings.items() if finding["status"] == "missing"]
    assert (done.returncode, missing, done.stderr) == (0, [], "")
    for name in ("python", "torch", "deepspeed", "megatron-core", "sentencepiece", "CPU", "memory", "disk", "recipes"):
        assert findings[name]["status"] in ("ok", "note")
