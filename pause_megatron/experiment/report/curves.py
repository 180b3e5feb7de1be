"""Figure 4: scores over pauses in finetuning (M_ft) and over pauses at inference (M_inf)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pause_megatron.experiment.report.collect import Collected
from pause_megatron.experiment.report.compare import Key, Summary
from pause_megatron.experiment.report.curve_plots import Panel, Series
from pause_megatron.experiment.report.plots import color_of
from pause_megatron.experiment.report.published import Published, PublishedCurve
from pause_megatron.experiment.report.tables import curve_table

PublishedCurves = Mapping[str, PublishedCurve | None]


@dataclass(frozen=True)
class Figure:
    """The panels of a figure, and their tables.

    Attributes:
        axis: "M_ft" or "M_inf".
        panels: The panels by task.
        tables: HTML, a table for each panel.
    """

    axis: str
    panels: Mapping[str, Panel]
    tables: str


def over_m_ft(
    collected: Collected, summaries: Mapping[Key, Summary], paper: Published, where: Callable[[str], str]
) -> Figure:
    """Return the M_ft ablation: each model with the number of pauses of its finetuning (fixed numbers only).

    Args:
        collected: The experiment.
        summaries: Scores over seeds.
        paper: The published numbers.
        where: Relative path of a cell's folder by its name.
    """
    found: dict[str, dict[str, dict[int, Summary]]] = {}
    for summary in summaries.values():
        if summary.m_ft.isdecimal() and summary.m_ft == str(summary.m_inf):
            points = found.setdefault(summary.task, {}).setdefault(summary.variant, {})
            points[int(summary.m_ft)] = summary
    curves = {
        task: {variant: (variant, points) for variant, points in lines.items() if len(points) > 1}
        for task, lines in found.items()
    }
    return _figure(collected, curves, {task: paper.over_m_ft(task) for task in curves}, paper, "M_ft", where)


def over_m_inf(
    collected: Collected, summaries: Mapping[Key, Summary], paper: Published, where: Callable[[str], str]
) -> Figure:
    """Return the M_inf curves: each model with other numbers of pauses than in its finetuning.

    Args:
        collected: The experiment.
        summaries: Scores over seeds.
        paper: The published numbers.
        where: Relative path of a cell's folder by its name.
    """
    found: dict[str, dict[tuple[str, str], dict[int, Summary]]] = {}
    for summary in summaries.values():
        points = found.setdefault(summary.task, {}).setdefault((summary.variant, summary.m_ft), {})
        points[summary.m_inf] = summary
    # A control with several numbers of fillers is no curve: all of its points are its own.
    curves = {
        task: {
            f"{variant}, M_ft={m_ft}": (variant, points)
            for (variant, m_ft), points in lines.items()
            if not all(each.own for each in points.values())
        }
        for task, lines in found.items()
    }
    return _figure(collected, curves, {task: paper.over_m_inf(task) for task in curves}, paper, "M_inf", where)


def _figure(
    collected: Collected,
    curves: Mapping[str, Mapping[str, tuple[str, Mapping[int, Summary]]]],
    published: PublishedCurves,
    paper: Published,
    axis: str,
    where: Callable[[str], str],
) -> Figure:
    """Return panels and tables of task -> {label: (variant, points)}, in the grid's order of tasks."""
    variants, tasks = list(collected.grid.variants), [task for task in collected.grid.tasks if curves.get(task)]
    panels = {
        task: Panel(
            paper.title(task),
            tuple(
                Series(label, color_of(variant, variants), points) for label, (variant, points) in curves[task].items()
            ),
            paper.chance(task),
            published[task],
        )
        for task in tasks
    }
    html = (
        curve_table(axis, {line.label: line.points for line in panel.lines}, panel.published, panel.title, where)
        for panel in panels.values()
    )
    return Figure(axis, panels, "".join(html))
