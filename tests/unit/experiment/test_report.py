"""What a report states: means over seeds, comparisons with support from records and seeds, the published numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pause_megatron.evaluate.statistics import wilson
from pause_megatron.experiment.report import plots, tables
from pause_megatron.experiment.report.collect import Score
from pause_megatron.experiment.report.compare import compare, corrected, smallest_visible, summarise
from pause_megatron.experiment.report.curve_plots import Panel, Series, draw_curves
from pause_megatron.experiment.report.flips import mcnemar
from pause_megatron.experiment.report.page import Cell, Part, picture, render, table
from pause_megatron.experiment.report.published import VARIANTS, published


def scores(variant: str, rate: float, seeds: int = 3, n: int = 400, m_ft: str = "10", m_inf: int = 10) -> list[Score]:
    """Made-up 0/1 scores: each record has a difficulty of its own, the same for every variant and seed."""
    difficulty = np.random.default_rng(0).uniform(size=n)
    found = []
    for seed in range(seeds):
        noise = np.random.default_rng([seed, len(variant)]).normal(scale=0.05, size=n)
        right = (difficulty + noise < rate).astype(float)
        records = {str(index): float(value) for index, value in enumerate(right)}
        found.append(
            Score(variant, "squad", m_ft, m_inf, seed, True, "exact_match", right.mean(), 0.02, n, records, "cell")
        )
    return found


def one(group: list[Score]):
    (found,) = summarise(group).values()
    return found


def test_a_summary_is_the_mean_over_seeds_with_both_intervals():
    group = scores("a", 0.3)
    values = [100 * score.value for score in group]
    found = one(group)
    assert found.value == pytest.approx(np.mean(values)) and found.seeds == 3 and found.n == found.groups == 400
    assert found.over_seeds == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    assert found.records["0"] == pytest.approx(np.mean([score.records["0"] for score in group]))
    assert found.low == min(found.record_low, found.seed_low) < found.value < found.high
    single = one(scores("a", 0.3, seeds=1))
    assert single.over_seeds is single.seed_low is None and single.low == single.record_low
    low, high = wilson(single.value / 100 * 400, 400)
    assert (single.low, single.high) == pytest.approx((100 * low, 100 * high))


@pytest.mark.parametrize(("rate", "low", "high"), [(-1.0, 0.0, 1.0), (2.0, 99.0, 100.0)])
def test_no_interval_is_empty_or_leaves_the_scale(rate, low, high):
    """All answers wrong, or all right, in all seeds: 0 of 400 allows 0.95 %."""
    found = one(scores("a", rate))
    assert found.value in (0.0, 100.0)
    assert 0 <= found.low <= low + 0.05 and high - 0.05 <= found.high <= 100 and found.high - found.low > 0.9


def test_records_that_share_a_text_widen_intervals():
    def grouped(rate: float) -> list[Score]:
        # Ten records of a group share their score: 400 records say as much as 40.
        return [
            dataclasses.replace(
                score,
                records={str(10 * g + k): score.records[str(g)] for g in range(40) for k in range(10)},
                groups={str(10 * g + k): f"story {g}" for g in range(40) for k in range(10)},
            )
            for score in scores("a", rate)
        ]

    by_group = one(grouped(0.4))
    alone = one([dataclasses.replace(score, groups={}) for score in grouped(0.4)])
    assert (by_group.groups, alone.groups) == (40, 400)
    assert by_group.record_high - by_group.record_low > 2.5 * (alone.record_high - alone.record_low)
    difference = compare(one(grouped(0.6)), by_group)
    assert difference.high - difference.low > 2 * (compare(one(scores("b", 0.6)), one(scores("b", 0.4))).high - 20) > 0


def test_a_difference_is_supported_by_records_and_seeds_or_not_at_all():
    base = one(scores("base", 0.3))
    better, same = compare(one(scores("variant", 0.45)), base), compare(one(scores("again", 0.3)), base)
    found = corrected({("variant", "squad"): better, ("again", "squad"): same})
    better, same = found.values()
    assert better.supported and better.low > 5 and better.difference == pytest.approx(15, abs=4)
    assert better.seed_low < better.difference < better.seed_high and better.p == max(better.p_records, better.p_seeds)
    assert better.p_holm == pytest.approx(2 * better.p)  # the smaller one of two
    assert not same.supported
    # The same difference is not supported among a hundred comparisons.
    many = corrected({("variant", str(number)): better if number == 0 else same for number in range(100)})
    assert not many["variant", "0"].supported
    # However clear over records: one seed supports nothing.
    single = compare(one(scores("variant", 0.45, seeds=1)), one(scores("base", 0.3, seeds=1)))
    assert single.p_records < 0.001 and single.p is None and not corrected({("a", "b"): single})["a", "b"].supported
    # Records of another evaluation are not compared.
    assert compare(one(scores("variant", 0.45, n=300)), base) is None
    assert compare(dataclasses.replace(one(scores("variant", 0.45)), data="other"), base) is None


def test_what_records_can_resolve_counts_groups():
    found = one(scores("a", 0.5))
    assert smallest_visible(dataclasses.replace(found, value=50.0, over_records=None)) == pytest.approx(
        100 * 2 * (2 * 0.25 / 400) ** 0.5
    )
    assert smallest_visible(dataclasses.replace(found, over_records=6.0)) == pytest.approx(2 * 2**0.5 * 6)


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert mcnemar(10, 5) == mcnemar(5, 10) == pytest.approx(0.3017578125)
    assert 0 < mcnemar(900, 500) < 1e-20


def test_the_published_numbers_are_the_papers():
    paper = published()
    table = {
        "gsm8k": (7.5, 6.9, 7.7, 8.5),
        "squad": (36.4, 40.2, 38.4, 55.9),
        "commonsense_qa": (26.9, 28.8, 27.7, 34.8),
        "lambada": (16.4, 18.5, 13.7, 18.8),
        "web_questions": (13.7, 12.4, 15.0, 16.0),
        "natural_questions": (23.6, 24.3, 24.3, 26.9),
        "coqa": (29.9, 30.7, 31.1, 31.6),
        "piqa": (73.3, 74.0, 74.1, 74.2),
        "hellaswag": (37.8, 37.9, 37.9, 37.8),
    }
    for task, numbers in table.items():
        assert tuple(paper.score(task, variant) for variant in VARIANTS) == numbers
    assert paper.over_m_inf("gsm8k").points == {0: 3.4, 2: 6.6, 5: 7.5, 10: 8.5, 25: 8.0, 50: 6.5}
    assert paper.over_m_inf("squad").points == {0: 33.2, 2: 34.5, 5: 35.4, 10: 36.5, 25: 38.7, 50: 40.1}
    assert paper.over_m_ft("gsm8k").points == {2: 7.1, 10: 8.5, 25: 8.2, 50: 7.7}
    assert (paper.filler("gsm8k"), paper.filler("squad"), paper.filler("piqa")) == (7.0, 35.7, None)
    assert "+-0.1" in paper.precision


def test_tables_show_intervals_and_the_paper_and_mark_supported_differences():
    paper = published()
    main = {
        (variant, "squad"): one(scores(variant, rate))
        for variant, rate in zip(VARIANTS, (0.30, 0.30, 0.31, 0.45), strict=True)
    }
    html = tables.variants_table(main, ["squad"], paper)
    assert "paper 55.9" in html and "n = 400, 3 seeds" in html and "±" not in html.partition("<tbody>")[2]
    base = main["StdPT_StdFT", "squad"]
    comparisons = corrected({key: compare(each, base) for key, each in main.items() if key[0] != VARIANTS[0]})
    html = tables.all_table(main, comparisons, ["squad"], paper, "cells/{}".format, {})
    assert html.partition("<tbody>")[2].count("◆") == 1 and "3 comparisons" in html
    assert html.count('href="cells/cell"') == 12
    (limit,) = tables.limits({("StdPT_StdFT", "squad"): one(scores("a", 0.005))}, ["squad"], "StdPT_StdFT", paper)
    assert "400 records, 3 seeds" in limit and "nothing follows about pauses" in limit
    # A grid's own task with its own chance level.
    own = published({"code": 12.5})
    near = {("a", "code"): dataclasses.replace(one(scores("a", 0.13)), task="code")}
    (limit,) = tables.limits(near, ["code"], "StdPT_StdFT", own)
    assert "guessing gets 12.5 %, and no variant is clearly above it" in limit


def test_plots_and_page_are_self_contained(tmp_path):
    paper = published()
    summaries = summarise([*scores("StdPT_StdFT", 0.3, m_ft="0", m_inf=0), *scores("PausePT_PauseFT", 0.4)])
    main = {(each.variant, each.task): each for each in summaries.values()}
    alt = plots.draw_variants(tmp_path / "a.png", main, "squad", paper)
    best = main["PausePT_PauseFT", "squad"]
    assert f"PausePT_PauseFT {best.value:.1f} ({best.low:.1f} to {best.high:.1f})" in alt
    plots.draw_all(tmp_path / "b.png", main, "squad", ["StdPT_StdFT", "PausePT_PauseFT"], "StdPT_StdFT", paper)
    points = {0: main["StdPT_StdFT", "squad"], 10: best}
    line, same = Series("a <line>", "#000000", points), Series("another", "#000000", {10: points[10]})
    panel = Panel("SQuAD", (line, same), 20.0, paper.over_m_inf("squad"))
    assert panel.counts == [0, 2, 5, 10, 25, 50]
    draw_curves(tmp_path / "c.png", panel, "pauses")
    draw_curves(tmp_path / "d.png", Panel("own", (same,)), "pauses")
    for name in "abcd":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    html = picture(tmp_path / "a.png", 'the "bars"') + table(["a", "b"], [["x_y", Cell("1.0", 1.0)]])
    page = render("A & B", "", [Part("x < y", html)])
    assert "A &amp; B" in page and "x &lt; y" in page and "data:image/png;base64," in page and "://" not in page
    assert 'data-value="1.0"' in page and "aria-sort" in page and 'alt="the &quot;bars&quot;"' in page
