"""Intervals by group hold the truth as often as they say, where those that take records for independent do not."""

from __future__ import annotations

import pytest
from benchmarks.coverage import SETTINGS, coverage


@pytest.mark.parametrize("setting", [SETTINGS[2], SETTINGS[8], SETTINGS[12]], ids=lambda each: each.what)
def test_intervals_by_group_hold_the_truth(setting):
    """120 data sets: one standard error is 2 %. Of 1,000 each: tests/benchmarks/results/coverage.md."""
    by_group, as_if_independent = coverage(setting, 120)
    assert by_group > 0.89
    assert by_group - as_if_independent > 0.05
