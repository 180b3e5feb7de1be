"""The reliability benchmark in small: what it counts is what happens, and its tables show every count."""

from __future__ import annotations

import pytest
from benchmarks.faults.flips import flips
from benchmarks.faults.pruning import prune
from benchmarks.faults.results import Result, markdown


@pytest.mark.parametrize("system", ["deepspeed", "pause-megatron"])
def test_flips_and_schedules_are_counted(system, tmp_path):
    found = flips(system, 4)
    outcomes = [outcome for counter in found.tables.values() for outcome in counter.elements()]
    assert len(outcomes) == 4 and found.note.startswith("4 flips")
    silent = [outcome for outcome in outcomes if "silent" in outcome]
    # Nothing is checked when DeepSpeed loads; most bits are of numbers.
    assert bool(silent) == (system == "deepspeed")

    rounds = prune(system, 1)
    (counter,) = rounds.tables.values()
    assert sum(number for outcome, number in counter.items() if outcome.startswith("a start")) >= 1

    rounds.write(tmp_path / "found.json")
    assert Result.read(tmp_path / "found.json") == rounds
    text = "\n".join(markdown({system: found, "again": rounds}))
    assert all(f"| {outcome} | " in text for outcome in {*outcomes, *counter})
