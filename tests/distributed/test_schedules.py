"""Damage, kills, stops, resumes, pruning and roll-backs in any order lose no complete checkpoint."""

from __future__ import annotations

from support.ranks import run_on_ranks
from support.schedules import run_schedules

SCHEDULES, FULL_SCHEDULES = 15, 100


def test_a_complete_checkpoint_never_goes_before_a_newer_one_exists(full):
    (happened,) = run_on_ranks(1, run_schedules, FULL_SCHEDULES if full else SCHEDULES, timeout=900)
    assert {"start", "save", "kill", "roll back"} <= happened.keys() and sum(happened.values()) > 50, happened
    print(happened)
