"""`pause-megatron benchmark`: input that cannot be measured is one error, before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
from pause_megatron.cli import main
code = main(["benchmark", *sys.argv[1:]])
assert not {"torch", "numpy", "deepspeed", "megatron"} & set(sys.modules), "imported before the error"
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "tiny"], "--recipe: expected one of"),
        (["--recipe", "tiny-pause", "batch.size=3"], "unknown key 'batch.size'"),
        (["--recipe", "tiny-pause", "parallel.tensor=2"], "expected a divisor of the number of ranks (1), got 2"),
        (["--recipe", "tiny-pause", "engine.ds_config=zero9"], "engine.ds_config: expected a DeepSpeed JSON file"),
        (["--recipe", "tiny-pause", "--json", "FOLDER"], "--json: expected a file, got the folder"),
        (["--recipe", "tiny-pause", "--json", "FOLDER/no/x.json"], "--json: expected a file that can be written"),
    ],
)
def test_bad_input_is_one_error_before_work_starts(arguments, message, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    arguments = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--steps", "0"], "argument --steps: expected an integer >= 1, got '0'"),
        (["--warmup", "-1"], "argument --warmup: expected an integer >= 0, got '-1'"),
        (["--top", "x"], "argument --top: expected an integer >= 0, got 'x'"),
        (["--vocab-size", "0"], "argument --vocab-size: expected an integer >= 1, got '0'"),
    ],
)
def test_numbers_have_a_least_value(option, message, capsys):
    from pause_megatron.cli import main

    assert main(["benchmark", "--recipe", "tiny-pause", *option]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
