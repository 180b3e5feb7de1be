"""Means, standard errors and the paired bootstrap, against known values and by coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pause_megatron.errors import DataError
from pause_megatron.evaluate import holm, interval, logit_interval, mean, paired_bootstrap, paired_t, wilson
from pause_megatron.evaluate.clusters import Clusters
from pause_megatron.evaluate.statistics import Mean, interval_of
from pause_megatron.evaluate.student import quantile, two_sided


def records(values) -> dict[str, float]:
    return {str(index): float(value) for index, value in enumerate(values)}


def test_mean_and_standard_error_are_the_textbooks():
    found = mean([1, 0, 0, 1, 1])
    assert (found.value, found.n) == (0.6, 5)
    assert found.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 4))  # binomial, n - 1
    assert mean([2.0, 4.0, 9.0]).standard_error == pytest.approx(math.sqrt(13 / 3))
    assert mean([0.25]) == Mean(0.25, None, 1, groups=1)
    with pytest.raises(DataError, match="at least one score"):
        mean([])


def test_the_mean_and_error_of_seeds_are_those_of_scipys_definition():
    values = np.random.default_rng(0).normal(0.3, 0.05, 5)
    found = mean(values)
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / 5**0.5)
    assert found.n == 5


def test_equal_differences_are_not_certain_but_as_wide_as_what_so_few_records_miss():
    scores = np.random.default_rng(1).random(200) * 0.75
    unseen = wilson(0, 200)[1]
    assert unseen == pytest.approx(0.0188, abs=1e-4)
    same = paired_bootstrap(records(scores), records(scores))
    assert (same.value, same.low, same.high, same.p_value) == (0, -unseen, unseen, 1)
    gain = paired_bootstrap(records(scores + 0.25), records(scores))
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.25, 0.25 - 1.25 * unseen, 0.25 + 0.75 * unseen))
    assert gain.p_value == pytest.approx(1 / 10_001)
    stories = {str(index): f"story {index // 20}" for index in range(200)}
    grouped = paired_bootstrap(records(scores), records(scores), stories)
    assert (grouped.high, grouped.groups) == (pytest.approx(wilson(0, 10)[1]), 10)


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
    gains = np.random.default_rng(50).normal(0.02, 0.005, 200)
    found = paired_bootstrap(records(hardness + gains), records(hardness))
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
    noisy = values + np.random.default_rng(9).normal(0, 1e-9, 100)
    counted = Clusters.of(values).resampled_means(np.random.default_rng(8), 20_000)
    drawn = Clusters.of(noisy).resampled_means(np.random.default_rng(10), 20_000)
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


def test_grouped_errors_are_the_sandwich_written_out():
    values, groups = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5], ["a", "a", "b", "b", "", ""]
    found = mean(values, groups)
    centre = 3.5 / 6
    residuals = [1 - 2 * centre, 2 - 2 * centre, 0 - centre, 0.5 - centre]
    expected = math.sqrt(4 / 3 * sum(each**2 for each in residuals)) / 6
    assert (found.value, found.n, found.groups) == (pytest.approx(centre), 6, 4)
    assert found.standard_error == pytest.approx(expected)
    assert mean(values, ["one"] * 6) == Mean(pytest.approx(centre), None, 6, groups=1)
    with pytest.raises(ValueError, match="one for each of 2 values, got 1"):
        mean([1.0, 0.0], ["a"])


def test_repeating_every_record_changes_no_grouped_error():
    values = np.random.default_rng(11).random(40)
    once = mean(values, [str(index) for index in range(40)])
    twice = mean(np.repeat(values, 2), [str(index // 2) for index in range(80)])
    assert (twice.value, twice.standard_error) == pytest.approx((once.value, once.standard_error))
    assert interval(np.repeat(values, 2), [str(index // 2) for index in range(80)]) == pytest.approx(interval(values))


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [(0, 200, (0.0, 0.01885)), (200, 200, (0.98115, 1.0)), (5, 10, (0.23659, 0.76341)), (81, 263, (0.2553, 0.3662))],
)
def test_wilsons_interval_is_the_published_one(successes, n, expected):
    """The last row: Newcombe 1998, table I, method 3 (81/263)."""
    assert wilson(successes, n) == pytest.approx(expected, abs=5e-5)
    assert interval([1.0] * successes + [0.0] * (n - successes)) == pytest.approx(wilson(successes, n))


def test_intervals_stay_on_the_scale_and_are_never_a_point():
    for scores in ([0.0] * 30, [1.0] * 30, [0.5] * 30, [0.02] * 29 + [0.9], [1.0], [0.0], [0.3, 0.9]):
        for groups in (None, [str(index // 3) for index in range(len(scores))], ["one"] * len(scores)):
            low, high = interval(scores, groups)
            assert 0 <= low < high <= 1
            assert low <= sum(scores) / len(scores) <= high
    of_groups = interval([0.0] * 200, [str(index // 10) for index in range(200)])
    assert of_groups[1] > wilson(0, 20)[1] > wilson(0, 200)[1]


def test_an_interval_from_value_and_error_alone_is_wilsons_or_the_normal_one():
    n, share = 263, 81 / 263
    found = Mean(share, math.sqrt(share * (1 - share) / n), n)
    assert interval_of(found) == pytest.approx(wilson(81, n))
    assert interval_of(Mean(0.0, 0.0, 200)) == pytest.approx(wilson(0, 200))
    assert interval_of(Mean(12.0, 0.5, 200)) == pytest.approx((12 - 0.98, 12 + 0.98), abs=1e-3)


def test_students_t_has_the_tables_values():
    table = {1: 12.7062, 2: 4.30265, 4: 2.77645, 7: 2.36462, 30: 2.04227, 1000: 1.96234, 10**6: 1.95997}
    for freedom, expected in table.items():
        assert quantile(0.95, freedom) == pytest.approx(expected, rel=1e-5)
        assert two_sided(-expected, freedom) == pytest.approx(0.05, rel=1e-4)
    assert two_sided(0.0, 3) == 1
    assert quantile(0.99, 4) == pytest.approx(4.60409, rel=1e-5)


def test_holm_adjusts_as_in_the_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_interval_over_seeds_stays_in_the_unit_interval():
    low, high = logit_interval([0.98, 0.995, 0.97])
    assert 0.86 < low < 0.97 < 0.995 < high < 1
    assert logit_interval([1.0, 1.0, 1.0], records=200) == wilson(200, 200)
    assert logit_interval([0.5, 0.5], records=200) == wilson(100, 200)
    assert logit_interval([0.5]) is None
    low, high = logit_interval([0.5, 0.6])
    logits = [0.0, math.log(1.5)]
    assert math.log(high / (1 - high)) == pytest.approx(np.mean(logits) + 12.7062 * np.std(logits, ddof=1) / 2**0.5)


def test_paired_t_is_the_textbooks_and_says_nothing_without_spread():
    found = paired_t([18.0, 22.0, 16.4])
    error = np.std([18.0, 22.0, 16.4], ddof=1) / 3**0.5
    assert (found.low, found.high) == pytest.approx((found.value - 4.30265 * error, found.value + 4.30265 * error))
    assert found.p_value == pytest.approx(two_sided(found.value / error, 2))
    assert paired_t([0.0, 0.0, 0.0]).p_value is None
    assert paired_t([0.1]).low is None


@pytest.mark.parametrize(
    ("gained", "lost", "same"), [(1, 0, 0), (2, 0, 0), (5, 0, 0), (4, 2, 9), (3, 3, 1), (9, 1, 40)]
)
def test_the_p_value_of_flipped_answers_is_mcnemars(gained, lost, same):
    one = {str(index): float(index < gained) for index in range(gained + lost + same)}
    other = {str(index): float(gained <= index < gained + lost) for index in range(gained + lost + same)}
    found = paired_bootstrap(one, other)
    tail = sum(math.comb(gained + lost, count) for count in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert gained + lost > 2 or found.low < 0  # so few records exclude nothing


def test_the_p_value_of_the_largest_difference_is_the_smallest():
    gained = {str(index): float(index < 199) for index in range(200)}
    assert paired_bootstrap(gained, dict.fromkeys(gained, 0.0)).p_value == pytest.approx(1 / 10_001)
    stories = dict.fromkeys(gained, "one story")
    assert paired_bootstrap(dict.fromkeys(gained, 1.0), dict.fromkeys(gained, 0.0), stories).p_value == 1.0


def test_the_p_value_agrees_with_the_interval():
    rng = np.random.default_rng(12)
    for trial in range(40):
        differences = rng.normal(0.2, 0.8, 60)
        groups = {str(index): str(index // 4) for index in range(60)}
        found = paired_bootstrap(records(differences), records(np.zeros(60)), groups, trial, resamples=2000)
        if abs(found.p_value - 0.05) > 0.03:
            assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)
