"""Tables of a report as HTML: numbers with their errors, counts and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from pause_megatron.experiment.estimate import si
from pause_megatron.experiment.ledger import Ledger
from pause_megatron.experiment.report.compare import Comparison, Summary, smallest_visible
from pause_megatron.experiment.report.published import VARIANTS, Published

Main = Mapping[tuple[str, str], Summary]
Comparisons = Mapping[tuple[str, str], Comparison]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """An HTML table; the cells are HTML, the first of a row is its head."""
    caption_html = f"<caption>{caption}</caption>" if caption else ""
    head_html = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return (
        f"<div class=scroll><table>{caption_html}<thead><tr>{head_html}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def number(summary: Summary | None) -> str:
    """ "12.3 ± 0.4"."""
    if summary is None:
        return "<span class=quiet>not run</span>"
    error = "" if summary.error is None else f" <span class=quiet>± {summary.error:.1f}</span>"
    return f"{summary.value:.1f}{error}"


def variants_table(main: Main, comparisons: Comparisons, tasks: Sequence[str], baseline: str, paper: Published) -> str:
    """Figure 3: tasks x the four variants, the paper's number below ours."""
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
    """ "+1.2 [0.3, 2.1] ◆"."""
    mark = " ◆" if found.supported else ""
    return f"<span class=quiet>{found.difference:+.1f} [{found.low:.1f}, {found.high:.1f}]</span>{mark}"


def controls_table(
    main: Main, comparisons: Comparisons, tasks: Sequence[str], variants: Mapping[str, str], paper: Published
) -> str:
    """Every variant, the controls too.

    Args:
        variants: name -> what it is, in words.
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
    theirs: tuple[str, Mapping[int, float]] | None,
    caption: str,
) -> str:
    """Curves of a task in numbers, a row each; the paper's last."""
    counts = sorted({count for points in ours.values() for count in points} | set(theirs[1] if theirs else ()))
    rows = [
        [escape(label), *(number(points[count]) if count in points else "" for count in counts)]
        for label, points in ours.items()
    ]
    if theirs:
        cells = (f"<span class=paper>{theirs[1][count]:.1f}</span>" if count in theirs[1] else "" for count in counts)
        rows.append([f"<span class=paper>paper, 1B: {escape(theirs[0])}</span>", *cells])
    return table([f"{escape(caption)}: {axis}", *map(str, counts)], rows)


def ledger_table(rows: Mapping[str, Ledger]) -> str:
    """Costs, a row each."""
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
    """What the numbers can and cannot say, a sentence for each task."""
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
