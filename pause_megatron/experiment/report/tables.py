"""The tables of a report as HTML: numbers with errors, counts and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from pause_megatron.experiment.estimate import si
from pause_megatron.experiment.ledger import Ledger
from pause_megatron.experiment.report.compare import Comparison, Summary, smallest_visible
from pause_megatron.experiment.report.published import VARIANTS, Published, PublishedCurve

Main = Mapping[tuple[str, str], Summary]
Comparisons = Mapping[tuple[str, str], Comparison]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return an HTML table.

    Args:
        head: Column heads, HTML.
        rows: Cells, HTML; the first of a row is its head.
        caption: Caption, HTML.
    """
    caption_html = f"<caption>{caption}</caption>" if caption else ""
    head_html = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return (
        f"<div class=scroll><table>{caption_html}<thead><tr>{head_html}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def number(summary: Summary | None) -> str:
    """Return a summary as "12.3 ± 0.4", or "not run"."""
    if summary is None:
        return "<span class=quiet>not run</span>"
    error = "" if summary.error is None else f" <span class=quiet>± {summary.error:.1f}</span>"
    return f"{summary.value:.1f}{error}"


def variants_table(main: Main, comparisons: Comparisons, tasks: Sequence[str], baseline: str, paper: Published) -> str:
    """Return Figure 3 as a table: tasks x the four variants, with the paper's numbers below.

    Args:
        main: Summary by (variant, task).
        comparisons: Comparison with the baseline by (variant, task).
        tasks: Tasks, a row each.
        baseline: Name of the baseline.
        paper: The published numbers.
    """
    rows = []
    for task in tasks:
        row = [f"{escape(paper.title(task))}<br><span class=quiet>{_facts(main, task)}</span>"]
        for variant in VARIANTS:
            summary = main.get((variant, task))
            lines = [f"<b>{number(summary)}</b>"]
            if summary is not None and summary.m_ft != "0":
                lines[0] += f" <span class=quiet>M={escape(summary.m_ft)}</span>"
            if (variant, task) in comparisons:
                lines.append(difference(comparisons[variant, task]))
            if (theirs := paper.score(task, variant)) is not None:
                lines.append(f"<span class=paper>paper {theirs:.1f}</span>")
            row.append("<br>".join(lines))
        rows.append(row)
    caption = (
        "Per cent. Ours: mean over seeds ± standard error over seeds (over records where there is one seed). Below it "
        f"the difference from {escape(baseline)} with the 95 % interval of a paired bootstrap over records; ◆ where "
        "the interval over records and the one over seeds both leave out 0. Paper: 1B, read off figures, ±0.1."
    )
    return table(["", *VARIANTS], rows, caption)


def difference(found: Comparison) -> str:
    """Return a comparison as "+1.2 [0.3, 2.1]", with ◆ if both intervals exclude 0."""
    mark = " ◆" if found.supported else ""
    return f"<span class=quiet>{found.difference:+.1f} [{found.low:.1f}, {found.high:.1f}]</span>{mark}"


def controls_table(
    main: Main, comparisons: Comparisons, tasks: Sequence[str], variants: Mapping[str, str], paper: Published
) -> str:
    """Return a table of every variant, controls included.

    Args:
        main: Summary by (variant, task).
        comparisons: Comparison with the baseline by (variant, task).
        tasks: Tasks, a column each.
        variants: Description by name of the variant.
        paper: The published numbers, for titles.
    """
    rows = []
    for variant, about in variants.items():
        row = [f"{escape(variant)}<br><span class=quiet>{escape(about)}</span>"]
        for task in tasks:
            summary = main.get((variant, task))
            lines = [number(summary)]
            if summary is not None:
                lines[0] += f" <span class=quiet>{_pauses(summary)}</span>"
            if (variant, task) in comparisons:
                lines.append(difference(comparisons[variant, task]))
            row.append("<br>".join(lines))
        rows.append(row)
    return table(["", *(escape(paper.title(task)) for task in tasks)], rows)


def curve_table(
    axis: str,
    ours: Mapping[str, Mapping[int, Summary]],
    published: PublishedCurve | None,
    caption: str,
) -> str:
    """Return the curves of a task as a table, the paper's last.

    Args:
        axis: "M_ft" or "M_inf".
        ours: Summary by number of pauses, by label.
        published: The paper's curve.
        caption: Title of the task.
    """
    counts = sorted(
        {count for points in ours.values() for count in points} | set(published.points if published else ())
    )
    rows = [
        [escape(label), *(number(points[count]) if count in points else "" for count in counts)]
        for label, points in ours.items()
    ]
    if published:
        values = (f"{published.points[count]:.1f}" if count in published.points else "" for count in counts)
        cells = (f"<span class=paper>{value}</span>" if value else "" for value in values)
        rows.append([f"<span class=paper>paper, 1B: {escape(published.label)}</span>", *cells])
    return table([f"{escape(caption)}: {axis}", *map(str, counts)], rows)


def ledger_table(rows: Mapping[str, Ledger]) -> str:
    """Return a table of costs, a row for each ledger."""
    head = [
        "",
        "cells",
        "model FLOP",
        "raw tokens",
        "text tokens",
        "pauses",
        "seconds of work",
        "wall seconds",
        "rank seconds",
    ]
    body = [
        [
            escape(name),
            f"{each.cells}",
            si(each.flops),
            si(each.raw_tokens),
            si(each.text_tokens),
            si(each.pauses),
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
        if not known:
            continue
        chance, best = paper.chance(task), max(summary.value for summary in known)
        n, seeds = known[0].n, min(summary.seeds for summary in known)
        base = main.get((baseline, task))
        visible = smallest_visible(n, base.value if base else best)
        text = f"{paper.title(task)}: {n:,} records, {seeds} seed{'s' if seeds > 1 else ''}; differences below about "
        text += f"{visible:.1f} points are within the noise of the records"
        if chance is not None:
            text += f"; guessing gets {chance:g} %"
            if best < chance + visible / 2:
                text += f", and no variant (best {best:.1f} %) is clearly above it, so nothing follows about pauses"
            elif best < 2.0:
                text += f", and the best variant gets {best:.1f} %: at this floor nothing follows about pauses"
        found.append(text + ".")
    return found


def _facts(main: Main, task: str) -> str:
    one = next((summary for (_, name), summary in main.items() if name == task), None)
    if one is None:
        return ""
    return f"{escape(one.metric)}, n = {one.n:,}, {one.seeds} seed{'s' if one.seeds > 1 else ''}"


def _pauses(summary: Summary) -> str:
    own = summary.m_ft.split("..")[-1] == str(summary.m_inf)
    return f"M={summary.m_ft}" if own else f"M={summary.m_ft}, at {summary.m_inf}"
