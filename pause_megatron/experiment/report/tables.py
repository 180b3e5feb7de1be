"""The tables of scores as HTML: values, intervals, single seeds, numbers of records, differences and p-values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from pause_megatron.experiment.estimate import si
from pause_megatron.experiment.ledger import Ledger
from pause_megatron.experiment.report.choice import Choice
from pause_megatron.experiment.report.compare import Comparison, Summary, smallest_visible
from pause_megatron.experiment.report.page import Cell, Row, breakable, link, table
from pause_megatron.experiment.report.published import VARIANTS, Published, PublishedCurve

Main = Mapping[tuple[str, str], Summary]
Comparisons = Mapping[tuple[str, str], Comparison]

INTERVALS = (
    "95 % intervals: the wider ends of the one over records (Wilson's, by group where records share a text) and, with "
    "several seeds, the one over seeds (Student's t on the logit scale). Both are in scores.csv."
)
_SCORES = ["M_ft", "M_inf", "score, %", "95 % interval", "single seeds", "n", "groups"]


def span(low: float, high: float) -> str:
    """Return an interval as "0.0 .. 1.9"."""
    return f"{low:.1f} .. {high:.1f}"


def probability(value: float | None) -> Cell:
    """Return a p-value as a cell, "<0.001" if it is small and "–" if there is none."""
    if value is None:
        return Cell("–", None)
    return Cell("&lt;0.001" if value < 0.001 else f"{value:.3f}", value)


def score_cells(summary: Summary, where: Callable[[str], str]) -> list[Cell | str]:
    """Return the cells of `_SCORES` of a summary.

    Args:
        summary: The summary.
        where: Relative path of a cell's folder by its name.
    """
    seeds = (
        f"{link(where(summary.cells[seed]), str(seed))}<span class=quiet>:</span> {value:.1f}"
        for seed, value in sorted(summary.by_seed.items())
    )
    return [
        Cell(escape(summary.m_ft), float(summary.m_ft.split("..")[-1])),
        str(summary.m_inf),
        Cell(f"<b>{summary.value:.1f}</b>", summary.value),
        Cell(span(summary.low, summary.high), summary.low),
        Cell(", ".join(seeds), len(summary.by_seed)),
        f"{summary.n:,}",
        f"{summary.groups:,}",
    ]


def variants_table(main: Main, tasks: Sequence[str], paper: Published) -> str:
    """Return Figure 3 as a table: tasks x the four variants, with the paper's numbers below.

    Args:
        main: Summary by (variant, task).
        tasks: Tasks, a row each.
        paper: The published numbers.
    """
    rows: list[Row] = []
    for task in tasks:
        row: list[str | Cell] = [f"{escape(paper.title(task))}<br><span class=quiet>{_facts(main, task)}</span>"]
        for variant in VARIANTS:
            summary = main.get((variant, task))
            if summary is None:
                lines = ["<span class=quiet>not run</span>"]
            else:
                marks = f" <span class=quiet>M={escape(summary.m_ft)}</span>" if summary.m_ft != "0" else ""
                interval = f"<span class=quiet>{span(summary.low, summary.high)}</span>"
                lines = [f"<b>{summary.value:.1f}</b>{marks}", interval]
            if (theirs := paper.score(task, variant)) is not None:
                lines.append(f"<span class=paper>paper {theirs:.1f}</span>")
            row.append(Cell("<br>".join(lines), None if summary is None else summary.value))
        rows.append(row)
    caption = f"Per cent, means over seeds. {INTERVALS} Paper: 1B, read off figures, ±0.1. Differences: next section."
    return table(["task", *map(breakable, VARIANTS)], rows, caption)


def all_table(
    main: Main,
    comparisons: Comparisons,
    tasks: Sequence[str],
    paper: Published,
    where: Callable[[str], str],
    pages: Mapping[tuple[str, str], str],
) -> str:
    """Return the table of every variant on every task, with its difference from the baseline.

    Args:
        main: Summary by (variant, task).
        comparisons: Comparison with the baseline by (variant, task).
        tasks: Tasks in their order.
        paper: The published numbers, for titles.
        where: Relative path of a cell's folder by its name.
        pages: Relative path of the page of flipped answers by (variant, task).
    """
    rows: list[Row] = []
    for (variant, task), summary in sorted(main.items(), key=lambda item: tasks.index(item[0][1])):
        row: list[str | Cell] = [breakable(variant), Cell(escape(paper.title(task)), paper.title(task))]
        row += score_cells(summary, where)
        row += _difference_cells(comparisons.get((variant, task)), pages.get((variant, task)))
        rows.append(row)
    head = ["variant", "task", *_SCORES, "difference", "over records", "over seeds", "p records", "p seeds"]
    head += ["p, Holm", "flipped answers"]
    caption = (
        f"{INTERVALS} Difference from the baseline in points, paired: over records (bootstrap by group) and over seeds "
        "(Student's t), each with its 95 % interval and two-sided p-value. The larger of both is corrected by Holm's "
        f"procedure for the {len(comparisons)} comparisons of this table; ◆ where the corrected one is below 0.05. "
        "Seeds link to the folders of their evaluations."
    )
    return table(head, rows, caption)


def choice_table(choices: Mapping[tuple[str, str], Choice], paper: Published) -> str:
    """Return the table of what was chosen from several M_ft or M_inf; "" if nothing was.

    Args:
        choices: Choice by (variant, task).
        paper: The published numbers, for titles.
    """
    rows: list[Row] = [
        [
            breakable(variant),
            escape(paper.title(task)),
            escape(_pauses(choice.chosen)),
            ", ".join(
                f"{escape(_pauses(each))}: {value:.1f}"
                for each, value in zip(choice.candidates, choice.values, strict=True)
            ),
            ", ".join(f"{escape(_pauses(each))}: {each.value:.1f}" for each in choice.candidates),
            escape(choice.records) + (": biased upwards" if choice.biased else ""),
        ]
        for (variant, task), choice in choices.items()
        if len(choice.candidates) > 1
    ]
    return (
        table(["variant", "task", "chosen", "scores that decided, %", "scores that are reported, %", "chosen on"], rows)
        if rows
        else ""
    )


def curve_table(
    axis: str,
    ours: Mapping[str, Mapping[int, Summary]],
    published: PublishedCurve | None,
    title: str,
    where: Callable[[str], str],
) -> str:
    """Return the curves of a task as a table, the paper's last.

    Args:
        axis: "M_ft" or "M_inf".
        ours: Summary by number of pauses, by label.
        published: The paper's curve.
        title: Title of the task.
        where: Relative path of a cell's folder by its name.
    """
    rows: list[Row] = [
        [breakable(label), *score_cells(summary, where)]
        for label, points in ours.items()
        for _, summary in sorted(points.items())
    ]
    for count, value in sorted(published.points.items()) if published else ():
        label = f"<span class=paper>paper, 1B: {escape(published.label)}</span>" if published else ""
        pauses = ["", str(count)] if axis == "M_inf" else [str(count), str(count)]
        rows.append([label, *pauses, Cell(f"<span class=paper>{value:.1f}</span>", value), "", "", "", ""])
    return table(["line", *_SCORES], rows, f"{escape(title)} over {axis}. {INTERVALS}")


def ledger_table(rows: Mapping[str, Ledger], what: str) -> str:
    """Return a table of costs, a row for each ledger.

    Args:
        rows: Ledger by label.
        what: Head of the labels.
    """
    head = [what, "cells", "model FLOP", "raw tokens", "text tokens", "pauses"]
    head += ["seconds of work", "wall seconds", "rank seconds"]
    body: Iterable[Row] = [
        [
            breakable(name),
            f"{each.cells}",
            *(Cell(si(count), float(count)) for count in (each.flops, each.raw_tokens, each.text_tokens, each.pauses)),
            f"{each.seconds:,.0f}",
            f"{each.wall_seconds:,.0f}",
            f"{each.rank_seconds:,.0f}",
        ]
        for name, each in rows.items()
    ]
    return table(head, body)


def limits(main: Main, tasks: Sequence[str], baseline: str, paper: Published) -> list[str]:
    """Return what the numbers can and cannot show, a sentence for each task.

    Args:
        main: Summary by (variant, task).
        tasks: The tasks.
        baseline: Name of the baseline.
        paper: The published numbers.
    """
    found = []
    for task in tasks:
        known = [summary for (_, name), summary in main.items() if name == task]
        best = max(known, key=lambda summary: summary.value)
        one, chance = main.get((baseline, task), best), paper.chance(task)
        groups = f" in {one.groups:,} groups" if one.groups != one.n else ""
        text = (
            f"{paper.title(task)}: {one.n:,} records{groups}, {_seeds(min(each.seeds for each in known))}; differences "
        )
        text += f"below about {smallest_visible(one):.1f} points are within the noise of unpaired records"
        if chance is not None:
            text += f"; guessing gets {chance:g} %"
            shown = f"{best.value:.1f} %, interval {span(best.low, best.high)}"
            if best.low <= chance:
                text += f", and no variant is clearly above it (best {shown}), so nothing follows about pauses"
            elif best.value < 2.0:
                text += f", and the best variant gets {shown}: at this floor nothing follows about pauses"
        found.append(text + ".")
    return found


def _difference_cells(found: Comparison | None, page: str | None) -> list[str | Cell]:
    """Return the cells of a comparison; empty ones for the baseline."""
    if found is None:
        return [Cell("", None)] * 7
    over_seeds = "–" if found.seed_low is None or found.seed_high is None else _signed(found.seed_low, found.seed_high)
    mark = " ◆" if found.supported else ""
    adjusted = probability(found.p_holm)
    return [
        Cell(f"{found.difference:+.1f}", found.difference),
        Cell(_signed(found.low, found.high), found.low),
        Cell(over_seeds, found.seed_low),
        probability(found.p_records),
        probability(found.p_seeds),
        Cell(adjusted.html + mark, adjusted.value),
        Cell(link(page, "answers"), page) if page else Cell("", None),
    ]


def _signed(low: float, high: float) -> str:
    return f"{low:+.1f} .. {high:+.1f}"


def _facts(main: Main, task: str) -> str:
    one = next(summary for (_, name), summary in main.items() if name == task)
    groups = f" in {one.groups:,} groups" if one.groups != one.n else ""
    return f"{escape(one.metric)}, n = {one.n:,}{groups}, {_seeds(one.seeds)}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _pauses(summary: Summary) -> str:
    own = summary.m_ft.split("..")[-1] == str(summary.m_inf)
    return f"M={summary.m_ft}" if own else f"M={summary.m_ft}, at {summary.m_inf}"
