"""The table of ds_configs/README.md: every row equals `plan`'s result."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pause_megatron.config.deepspeed import ds_config_names, zero_stage
from pause_megatron.config.gpus import GIB
from pause_megatron.config.load import load, recipe_names
from pause_megatron.plan import GPUS, Cluster, make_plan

README = Path(__file__).resolve().parents[3] / "ds_configs" / "README.md"
HEADER = "| recipe | GPUs | on top | a GPU | largest |"
DEFAULT_STAGE = zero_stage(load())
ROWS = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `c4-")]


def row(recipe: str, nodes: int, gpus: int, gpu: str, keys: str) -> str:
    plan = make_plan(load(recipe=recipe, overrides=keys.split()), Cluster(GPUS[gpu], nodes, gpus), text_size=32_000)
    assert plan.fits, (recipe, gpu, keys)
    size = f"{plan.footprint.total / GIB:.1f} of {plan.footprint.capacity / GIB:.1f} GiB"
    shown = f"`{keys}`" if keys else "nothing"
    return f"| `{recipe}` | {nodes} x {gpus} {gpu} | {shown} | {size} | {plan.largest_micro_size} |"


@pytest.mark.parametrize("line", ROWS)
def test_a_row_is_what_plan_says(line):
    recipe, where, keys, *_ = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
    nodes, _, gpus, gpu = where.split()
    assert row(recipe, int(nodes), int(gpus), gpu, "" if keys == "nothing" else keys) == line


def test_every_common_gpu_every_size_and_every_shipped_file_has_a_row():
    assert HEADER in README.read_text(encoding="utf-8")
    text = "\n".join(ROWS)
    common = [
        name for name in GPUS if name.startswith(("a100", "h100", "h200")) and name not in ("h100-pcie", "h200-nvl")
    ]
    assert [gpu for gpu in common if f" {gpu} |" not in text] == []
    recipes = {name for name in recipe_names() if name.startswith("c4-") and name.endswith("-pause")}
    assert {re.match(r"\| `(c4-\w+-pause)`", line)[1] for line in ROWS} == recipes
    named = set(re.findall(r"engine\.ds_config=([\w-]+)", text))
    assert named | {f"zero{DEFAULT_STAGE}"} == set(ds_config_names())  # a row that names none has the default's
