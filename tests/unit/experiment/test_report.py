"""What a report states: means over seeds, comparisons with support from records and seeds, the published numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pause_megatron.experiment.report import plots, tables
from pause_megatron.experiment.report.collect import Score
from pause_megatron.experiment.report.compare import compare, smallest_visible, summarise, t_interval
from pause_megatron.experiment.report.curve_plots import Panel, Series, draw_curves
from pause_megatron.experiment.report.page import Part, picture, render
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


def test_a_summary_is_the_mean_over_seeds_and_its_error():
    group = scores("a", 0.3)
    values = [100 * score.value for score in group]
    found = one(group)
    assert found.value == pytest.approx(np.mean(values)) and found.seeds == 3 and found.n == 400
    assert found.error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    assert found.records["0"] == pytest.approx(np.mean([score.records["0"] for score in group]))
    single = one(scores("a", 0.3, seeds=1))
    assert single.over_seeds is None and single.error == pytest.approx(2.0)  # over records, per cent


def test_a_difference_is_supported_by_records_and_seeds_or_not_at_all():
    base = one(scores("base", 0.3))
    better, same = compare(one(scores("variant", 0.45)), base), compare(one(scores("again", 0.3)), base)
    assert better.supported and better.low > 5 and better.difference == pytest.approx(15, abs=4)
    assert better.seed_low < better.difference < better.seed_high
    assert not same.supported
    # However clear over records: one seed supports nothing.
    assert not compare(one(scores("variant", 0.45, seeds=1)), one(scores("base", 0.3, seeds=1))).supported
    # Records of another evaluation are not compared.
    assert compare(one(scores("variant", 0.45, n=300)), base) is None
    unsteady = dataclasses.replace(base, by_seed={0: 90.0, 1: 1.0, 2: 40.0})
    assert not compare(unsteady, one(scores("variant", 0.05))).supported


def test_students_interval_is_the_textbooks():
    # Mean 2, standard error 1 / sqrt(3), quantile 4.303 for two degrees of freedom.
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), rel=1e-3)
    assert t_interval([1.0]) == (None, None)
    assert smallest_visible(400, 50.0) == pytest.approx(100 * 2 * (2 * 0.25 / 400) ** 0.5)


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


def test_tables_show_errors_and_the_paper_and_mark_supported_differences():
    paper = published()
    main = {
        (variant, "squad"): one(scores(variant, rate))
        for variant, rate in zip(VARIANTS, (0.30, 0.30, 0.31, 0.45), strict=True)
    }
    comparisons = {
        key: compare(each, main["StdPT_StdFT", "squad"]) for key, each in main.items() if key[0] != VARIANTS[0]
    }
    html = tables.variants_table(main, comparisons, ["squad"], "StdPT_StdFT", paper)
    body = html.partition("<tbody>")[2]
    assert body.count("◆") == 1 and "paper 55.9" in body and "n = 400, 3 seeds" in body and "±" in body
    assert "not run" in tables.variants_table(main, {}, ["squad", "gsm8k"], "StdPT_StdFT", paper)
    (limit,) = tables.limits({("StdPT_StdFT", "squad"): one(scores("a", 0.005))}, ["squad"], "StdPT_StdFT", paper)
    assert "400 records, 3 seeds" in limit and "nothing follows about pauses" in limit


def test_plots_and_page_are_self_contained(tmp_path):
    paper = published()
    summaries = summarise([*scores("StdPT_StdFT", 0.3, m_ft="0", m_inf=0), *scores("PausePT_PauseFT", 0.4)])
    main = {(each.variant, each.task): each for each in summaries.values()}
    plots.draw_variants(tmp_path / "a.png", main, ["squad"], paper)
    plots.draw_all(tmp_path / "b.png", main, ["squad"], ["StdPT_StdFT", "PausePT_PauseFT"], "StdPT_StdFT", paper)
    points = {0: main["StdPT_StdFT", "squad"], 10: main["PausePT_PauseFT", "squad"]}
    line, same = Series("a <line>", "#000000", points), Series("another", "#000000", {10: points[10]})
    panel = Panel("SQuAD", (line, same), 20.0, paper.over_m_inf("squad"))
    assert panel.counts == [0, 2, 5, 10, 25, 50]
    draw_curves(tmp_path / "c.png", [panel, *(Panel(f"own {number}", (line,)) for number in range(4))], "pauses")
    draw_curves(tmp_path / "d.png", [Panel("own", (line,))], "pauses")
    for name in "abcd":
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = render("A & B", "", [Part("x < y", picture(tmp_path / "a.png", 'the "bars"'))])
    assert "A &amp; B" in page and "x &lt; y" in page and "data:image/png;base64," in page and "://" not in page
