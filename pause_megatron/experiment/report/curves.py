"""Figure 4: scores over the pauses of the finetuning (M_ft) and over those of the inference (M_inf)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pause_megatron.experiment.report.collect import Collected
from pause_megatron.experiment.report.compare import Key, Summary
from pause_megatron.experiment.report.plots import Series, color_of
from pause_megatron.experiment.report.published import Published
from pause_megatron.experiment.report.tables import points_table

Theirs = Mapping[str, tuple[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Figure:
    """A set of panels.

    Attributes:
        panels: title -> lines. published: title -> (label, {pauses: per cent}). tables: HTML.
    """

    panels: Mapping[str, tuple[Series, ...]]
    published: Theirs
    tables: str


def over_m_ft(collected: Collected, summaries: Mapping[Key, Summary], paper: Published) -> Figure:
    """The M_ft ablation: each model prompted with as many pauses as it was finetuned with. Fixed numbers only."""
    panels: dict[str, tuple[Series, ...]] = {}
    theirs: dict[str, tuple[str, Mapping[int, float]]] = {}
    tables = []
    for task in collected.grid.tasks:
        lines = []
        for variant in collected.grid.variants:
            points = {
                int(summary.m_ft): summary
                for summary in summaries.values()
                if (summary.variant, summary.task) == (variant, task)
                and summary.m_ft.isdecimal()
                and summary.m_ft == str(summary.m_inf)
            }
            if len(points) > 1:
                lines.append(Series(variant, color_of(variant, list(collected.grid.variants)), points))
                known = paper.over_m_ft(task, variant)
                tables.append(points_table(points, known, "M_ft", f"{paper.title(task)}, {variant}"))
                if known:
                    theirs[paper.title(task)] = (variant, known)
        if lines:
            panels[paper.title(task)] = tuple(lines)
    return Figure(panels, theirs, "".join(tables))


def over_m_inf(collected: Collected, summaries: Mapping[Key, Summary], paper: Published) -> Figure:
    """The M_inf curves: one model, prompted with other numbers of pauses than it was finetuned with."""
    panels: dict[str, tuple[Series, ...]] = {}
    theirs: dict[str, tuple[str, Mapping[int, float]]] = {}
    tables = []
    variants = list(collected.grid.variants)
    for task in collected.grid.tasks:
        found: dict[tuple[str, str], dict[int, Summary]] = {}
        for summary in summaries.values():
            if summary.task == task:
                found.setdefault((summary.variant, summary.m_ft), {})[summary.m_inf] = summary
        # A control that is only prompted with several fillers is no curve: it has no point that is not its own.
        curves = {key: points for key, points in found.items() if not all(each.own for each in points.values())}
        for (variant, m_ft), points in curves.items():
            known = paper.over_m_inf(task, variant, m_ft)
            caption = f"{paper.title(task)}, {variant}, M_ft = {m_ft}"
            tables.append(points_table(points, known, "M_inf", caption))
            if known:
                theirs[paper.title(task)] = (f"{variant}, M_ft={m_ft}", known)
        if curves:
            panels[paper.title(task)] = tuple(
                Series(f"{variant}, M_ft={m_ft}", color_of(variant, variants), points)
                for (variant, m_ft), points in curves.items()
            )
    return Figure(panels, theirs, "".join(tables))
