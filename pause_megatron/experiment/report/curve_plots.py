"""The pictures of Figure 4, one for each task: scores over a number of pauses, above the paper's, both from 0."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pause_megatron.experiment.report.compare import Summary
from pause_megatron.experiment.report.plots import CHANCE, WIDTH, described, lengths, pyplot, save
from pause_megatron.experiment.report.published import PublishedCurve

# Dashes and markers separate lines of one color (a variant with several M_ft).
_DASHES, _MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")
_OFFSET = 0.012
"""Offset between lines at the same number of pauses, as a share of the axis, so that no error bar hides another."""


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


def draw_curves(path: Path, panel: Panel, axis: str) -> str:
    """Draw the curves of a task, and the paper's below them.

    The axis is the number of pauses on a square-root scale, so that 0, 2, 5 and 50 have room. Lines join only measured
    numbers of pauses of one finetuned model, or of models that differ in M_ft alone.

    Args:
        path: PNG to write.
        panel: The task.
        axis: Label of the x axis.

    Returns:
        The alternative text.
    """
    rows = 2 if panel.published else 1
    figure = pyplot().figure(figsize=(WIDTH, 5.2 if panel.published else 3.4), layout="constrained")
    grid = figure.add_gridspec(rows, 1, height_ratios=[2.0, 1.3][:rows])
    axes = figure.add_subplot(grid[0, 0])
    _lines(axes, panel, axis)
    if panel.published:
        _published_line(figure.add_subplot(grid[1, 0]), panel, panel.published, axis)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", fontsize=8)
    save(figure, path)
    points = {f"{line.label} at {count}": one for line in panel.lines for count, one in sorted(line.points.items())}
    return described(f"{panel.title} over {axis}", points, panel.chance)


def _lines(axes: Any, panel: Panel, axis: str) -> None:
    tops, of_color = [1.0, panel.chance or 0.0], Counter[str]()
    step = _OFFSET * (math.sqrt(max(panel.counts)) - math.sqrt(min(panel.counts)))
    for number, line in enumerate(panel.lines):
        shift = (number - (len(panel.lines) - 1) / 2) * step
        rank = of_color[line.color]
        of_color[line.color] += 1
        x = sorted(line.points)
        summaries = [line.points[count] for count in x]
        axes.errorbar(
            [math.sqrt(count) + shift for count in x],
            [each.value for each in summaries],
            yerr=lengths(summaries),
            marker=_MARKERS[rank % len(_MARKERS)],
            linestyle=_DASHES[rank % len(_DASHES)],
            markersize=4,
            capsize=3,
            color=line.color,
            label=line.label,
        )
        tops += [each.high for each in summaries]
    if panel.chance:
        axes.axhline(panel.chance, color=CHANCE, linestyle=":", linewidth=1.5, label="chance")
    axes.set_title(panel.title, fontsize=9)
    _frame(axes, panel.counts, axis, "ours, per cent", max(tops))


def _published_line(axes: Any, panel: Panel, curve: PublishedCurve, axis: str) -> None:
    counts = sorted(curve.points)
    x, y = [math.sqrt(count) for count in counts], [curve.points[count] for count in counts]
    axes.plot(x, y, "s--", color="#7f7f7f", markersize=4)
    for point in zip(x, y, strict=True):
        axes.annotate(f"{point[1]:.1f}", point, (0, 4), textcoords="offset points", ha="center", fontsize=8)
    axes.set_title(f"{panel.title} in the paper: {curve.label}", fontsize=8)
    _frame(axes, panel.counts, axis, "paper, 1B", max(y))


def _frame(axes: Any, counts: Sequence[int], axis: str, label: str, top: float) -> None:
    first, last = math.sqrt(min(counts)), math.sqrt(max(counts))
    margin = 0.06 * (last - first) or 1.0
    axes.set_xlim(first - margin, last + margin)
    axes.set_xticks([math.sqrt(count) for count in counts], counts, fontsize=8)
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlabel(axis, fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.25)
