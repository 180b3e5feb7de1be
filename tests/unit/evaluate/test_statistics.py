"""Means, standard errors and the paired bootstrap, against known values and by coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pause_megatron.errors import DataError
from pause_megatron.evaluate import mean, paired_bootstrap
from pause_megatron.evaluate.statistics import resampled_means


def records(values) -> dict[str, float]:
    return {str(index): float(value) for index, value in enumerate(values)}


def test_mean_and_standard_error_are_the_textbooks():
    found = mean([1, 0, 0, 1, 1])
    assert (found.value, found.n) == (0.6, 5)
    assert found.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))  # binomial, n - 1
    assert mean([2.0, 4.0, 9.0]).standard_error == pytest.approx(math.sqrt(13 / 3))
    assert mean([0.25]) == mean([0.25]).__class__(0.25, None, 1)
    with pytest.raises(DataError, match="at least one score"):
        mean([])


def test_the_mean_and_error_of_seeds_are_those_of_scipys_definition():
    values = np.random.default_rng(0).normal(0.3, 0.05, 5)
    found = mean(values)
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / 5**0.5)
    assert found.n == 5


def test_equal_scores_differ_by_nothing_and_a_constant_gain_by_itself():
    scores = np.random.default_rng(1).random(50)
    same = paired_bootstrap(records(scores), records(scores))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    gain = paired_bootstrap(records(scores + 0.25), records(scores))
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_is_the_normal_one_for_many_records():
    rng = np.random.default_rng(2)
    a, b = rng.random(4000) < 0.6, rng.random(4000) < 0.5
    found = paired_bootstrap(records(a), records(b), seed=3)
    differences = a.astype(float) - b
    half = 1.959964 * differences.std(ddof=1) / 4000**0.5
    assert found.value == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.06 * half)
    assert (found.n, found.resamples, found.confidence) == (4000, 10_000, 0.95)


def test_seed_order_and_sign():
    rng = np.random.default_rng(4)
    a, b = records(rng.random(100)), records(rng.random(100))
    found = paired_bootstrap(a, b, seed=7)
    assert found == paired_bootstrap(dict(reversed(a.items())), b, seed=7)
    assert found != paired_bootstrap(a, b, seed=8)
    other = paired_bootstrap(b, a, seed=7)
    assert (other.value, other.low, other.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_pairing_sees_what_two_separate_means_do_not():
    hardness = np.random.default_rng(5).random(200)
    found = paired_bootstrap(records(hardness + 0.02), records(hardness))
    assert found.low > 0.019
    assert mean(hardness).standard_error > 0.015


@pytest.mark.parametrize("few", [True, False])
def test_ninety_five_percent_intervals_hold_the_truth_as_often_as_they_say(few):
    """Both ways of resampling. Percentile intervals of 60 records: nominal 95 %, about 94 % in truth."""
    rng = np.random.default_rng(6)
    trials, held = 250, 0
    for trial in range(trials):
        differences = rng.choice([-1.0, 0.0, 1.0], 60, p=[0.2, 0.4, 0.4]) if few else rng.normal(0.2, 1, 60)
        found = paired_bootstrap(records(differences), records(np.zeros(60)), seed=trial, resamples=1000)
        held += found.low <= 0.2 <= found.high
    assert 0.90 < held / trials < 0.985


def test_the_two_ways_of_resampling_have_one_distribution():
    values = np.random.default_rng(7).choice([-1.0, 0.0, 1.0], 100)
    counted = resampled_means(values, np.random.default_rng(8), 20_000)
    drawn = resampled_means(values + np.random.default_rng(9).normal(0, 1e-9, 100), np.random.default_rng(10), 20_000)
    levels = [0.01, 0.025, 0.25, 0.5, 0.75, 0.975, 0.99]
    assert np.quantile(counted, levels) == pytest.approx(np.quantile(drawn, levels), abs=0.011)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ({"1": 1.0, "2": 0.0}, {"1": 1.0, "3": 0.0}, {}, r"got 1 ids only on the left \(such as \['2'\]\)"),
        ({}, {}, {}, "at least one record"),
        ({"1": 1.0}, {"1": 1.0}, {"resamples": 0}, "1 resample or more"),
        ({"1": 1.0}, {"1": 1.0}, {"confidence": 95}, "0 < confidence < 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, options, message):
    with pytest.raises(DataError, match=message):
        paired_bootstrap(a, b, **options)
