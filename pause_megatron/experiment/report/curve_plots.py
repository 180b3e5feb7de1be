"""The plots of Figure 4: scores over a number of pauses, above the paper's, both from 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_megatron.experiment.report.compare import Summary
from pause_megatron.experiment.report.plots import COLUMNS, pyplot, save
from pause_megatron.experiment.report.published import PublishedCurve

# Dashes and markers separate lines of one color (a variant with several M_ft).
_DASHES, _MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
_OFFSET = 0.07
"""Offset between lines at the same number of pauses, in ticks, so that no error bar hides another."""


@dataclass(frozen=True)
class Series:
    """A line of a plot: scores over numbers of pauses.

    Attributes:
        label: Label in the legend.
        color: Colour of the variant.
        points: Summary by number of pauses.
    """

    label: str
    color: str
    points: Mapping[int, Summary]


@dataclass(frozen=True)
class Panel:
    """The lines of a task.

    Attributes:
        title: Title.
        lines: The lines.
        chance: Score of guessing, per cent; None if unknown.
        published: The paper's curve; None without one.
    """

    title: str
    lines: tuple[Series, ...]
    chance: float | None = None
    published: PublishedCurve | None = None

    @property
    def counts(self) -> list[int]:
        """Numbers of pauses on the axis: those of the lines and of the paper."""
        published = self.published.points if self.published else {}
        return sorted({count for line in self.lines for count in line.points} | set(published))


def draw_curves(path: Path, panels: Sequence[Panel], axis: str) -> None:
    """Draw a panel per task, and below each row of panels the paper's curves of its tasks.

    Args:
        path: PNG to write.
        panels: The panels.
        axis: Label of the x axis.
    """
    columns = min(COLUMNS, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    ratios = [ratio for row in rows for ratio in ((2.0, 1.3) if any(p.published for p in row) else (2.0,))]
    figure = pyplot().figure(figsize=(4.0 * columns, 0.5 + 1.5 * sum(ratios)), layout="constrained")
    grid = figure.add_gridspec(len(ratios), columns, height_ratios=ratios)
    ranks, top = _ranks(panels), 0
    named: dict[str, Any] = {}
    for row in rows:
        for column, panel in enumerate(row):
            axes = figure.add_subplot(grid[top, column])
            _lines(axes, panel, axis, ranks)
            named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            if panel.published:
                _published_line(figure.add_subplot(grid[top + 1, column]), panel, panel.published, axis)
        top += 2 if any(panel.published for panel in row) else 1
    figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=2 * columns - 1, fontsize=8)
    save(figure, path)


def _ranks(panels: Sequence[Panel]) -> dict[str, int]:
    """Return the index of each label among the lines of its color, the same in all panels."""
    of_color: Counter[str] = Counter()
    ranks: dict[str, int] = {}
    for line in (line for panel in panels for line in panel.lines):
        if line.label not in ranks:
            ranks[line.label] = of_color[line.color]
            of_color[line.color] += 1
    return ranks


def _lines(axes: Any, panel: Panel, axis: str, ranks: Mapping[str, int]) -> None:
    counts, tops = panel.counts, [1.0, panel.chance or 0.0]
    for number, line in enumerate(panel.lines):
        shift = (number - (len(panel.lines) - 1) / 2) * _OFFSET
        x, rank = sorted(line.points), ranks[line.label]
        y, errors = [line.points[count].value for count in x], [line.points[count].error or 0.0 for count in x]
        axes.errorbar(
            [counts.index(count) + shift for count in x],
            y,
            yerr=errors,
            marker=_MARKERS[rank % len(_MARKERS)],
            linestyle=_DASHES[rank % len(_DASHES)],
            markersize=4,
            capsize=3,
            color=line.color,
            label=line.label,
        )
        tops += [value + error for value, error in zip(y, errors, strict=True)]
    if panel.chance:
        axes.axhline(panel.chance, color="#aa0000", linestyle=":", linewidth=1.5, label="chance")
    axes.set_title(panel.title, fontsize=9)
    _frame(axes, counts, axis, "ours, per cent", max(tops))


def _published_line(axes: Any, panel: Panel, curve: PublishedCurve, axis: str) -> None:
    x = [panel.counts.index(count) for count in sorted(curve.points)]
    y = [curve.points[count] for count in sorted(curve.points)]
    axes.plot(x, y, "s--", color="#7f7f7f", markersize=4)
    for point in zip(x, y, strict=True):
        axes.annotate(f"{point[1]:.1f}", point, (0, 4), textcoords="offset points", ha="center", fontsize=7)
    axes.set_title(f"{panel.title} in the paper: {curve.label}", fontsize=8)
    _frame(axes, panel.counts, axis, "paper, 1B", max(y))


def _frame(axes: Any, counts: Sequence[int], axis: str, label: str, top: float) -> None:
    axes.set_xlim(-0.4, len(counts) - 0.6)
    axes.set_xticks(range(len(counts)), counts, fontsize=8)
    axes.set_ylim(0, 1.2 * top)
    axes.set_xlabel(axis, fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.25)
