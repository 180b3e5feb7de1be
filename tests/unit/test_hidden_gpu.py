"""The ordinary suite shows no GPU to its tests, nor to their child processes; the tests on a GPU see it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.hidden_gpu import asks_for_gpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("expression", "paths", "asked"),
    [
        ("", ["tests"], False),
        ("", ["tests/gpu", "tests/unit"], False),
        ("", ["tests/gpu"], True),
        ("", ["tests/gpu/test_variable_length_gpu.py::test_kernel_is_the_mask"], True),
        ("", [], False),
        ("gpu", ["tests"], True),
        ("gpu and not slow", ["tests"], True),
        ("not gpu", ["tests"], False),
        ("compat and not gpu", ["tests"], False),
        ("compat", ["tests"], False),
    ],
)
def test_who_asks_for_a_gpu(expression, paths, asked):
    assert asks_for_gpu(expression, [str(ROOT / path) for path in paths], ROOT) is asked


def test_a_collection_hides_it_before_torch_is_there():
    """What pytest itself does, in processes that begin with a visible GPU."""
    plugin = "import os\ndef pytest_collection(session): print('seen', os.environ['CUDA_VISIBLE_DEVICES'] or 'none')"
    for path, seen in (("tests/unit/test_hidden_gpu.py", "none"), ("tests/gpu", "7")):
        program = (
            "import sys, types, pytest\n"
            f"plugin = types.ModuleType('plugin'); exec({plugin!r}, plugin.__dict__)\n"
            f"pytest.main(['--collect-only', '-q', '-s', '-p', 'no:cacheprovider', {path!r}], plugins=[plugin])"
        )
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "7"}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert f"seen {seen}" in done.stdout, done.stdout + done.stderr


def test_this_session_hides_it_unless_it_was_asked_for(request):
    config = request.config
    if not asks_for_gpu(config.option.markexpr, config.args, config.rootpath):
        child = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout.splitlines()
        assert "CUDA_VISIBLE_DEVICES=" in child


@pytest.mark.parametrize("expression", ["not gpu", "not (gpu or slow)", "not(gpu)", "compat", "slow and not gpu"])
def test_expressions_that_leave_the_gpu_out(expression):
    assert not asks_for_gpu(expression, [], ROOT)


@pytest.mark.parametrize("expression", ["gpu", "gpu and not slow", "slow or gpu", "(gpu)"])
def test_expressions_that_choose_the_gpu(expression):
    assert asks_for_gpu(expression, [], ROOT)
